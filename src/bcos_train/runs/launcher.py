"""The launcher that started this process, if any: torchrun, srun or submitit.

Variables that look like a launcher's are also found where none has started anything: in interactive shells of Slurm and
MPI, and left over from an earlier job. A process that believed them would wait for others that don't exist.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Launched", "follows_rank_zero", "launched", "mpi_processes", "rank"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Number of processes that mpirun or jsrun has started, by Open MPI, MVAPICH, IBM's jsrun, and MPICH or Intel MPI.
_MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that a launcher started.

    Attributes:
        launcher: ``"torchrun"`` or ``"srun"``.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        local_rank: Number of this process among those of its node; ``None``: unknown.
        nodes: Number of nodes; ``None``: unknown.
        address, port: Where rank 0 waits for the others.
        variables: Environment variables that say so.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    nodes: int | None
    address: str
    port: int
    variables: tuple[str, ...]

    @property
    def host(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def hint(self) -> str:
        """What to do if no launcher has started this process."""
        return f"if {self.launcher} has started nothing, unset {' '.join(self.variables)}"


def rank() -> int:
    """Return the rank that the launcher assigned to this process; 0 without a launcher."""
    try:
        place = launched()
    except ValueError:
        return 0
    return 0 if place is None else place.rank


def follows_rank_zero() -> bool:
    """True if a launcher has certainly started other processes, of which rank 0 prints the common messages.

    ``RANK`` alone may be left over; torchrun sets more than that.
    """
    return rank() > 0 and ("RANK" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ)


def launched() -> Launched | None:
    """Return this process's place among those that a launcher started; ``None`` without a launcher.

    Raises:
        ValueError: The environment variables are incomplete or contradict each other.
    """
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE"):
        return _by_torchrun(os.environ)
    if _int(os.environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and not _is_interactive_shell(os.environ):
        return _by_srun(os.environ)
    return None


def mpi_processes() -> tuple[str, int] | None:
    """Return the variable and the number of processes that MPI has started, if there are several."""
    for name in _MPI:
        if (size := _int(os.environ, name, 1)) > 1:
            return name, size
    return None


def _by_torchrun(environment: Mapping[str, str]) -> Launched:
    rank, world_size = _int(environment, "RANK"), _int(environment, "WORLD_SIZE")
    set_variables = tuple(name for name in _TORCHRUN if name in environment)
    hint = f"start with torchrun, or unset {' '.join(set_variables)}"
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} contradict each other: {hint}")
    missing = [name for name in _TORCHRUN if name not in environment]
    if world_size > 1 and missing:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} are set, but not {' and '.join(missing)}: {hint}")
    local_world_size = _int(environment, "LOCAL_WORLD_SIZE", 0)
    return Launched(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=_int(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None,
        nodes=world_size // local_world_size if local_world_size else None,
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=_int(environment, "MASTER_PORT", 29500),
        variables=set_variables,
    )


def _by_srun(environment: Mapping[str, str]) -> Launched:
    nodes = _int(environment, "SLURM_STEP_NUM_NODES", 1)
    address = "127.0.0.1" if nodes == 1 else _first_node(environment.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    # All processes of the step know it, and other steps of the same job have another one.
    port = 15000 + (_int(environment, "SLURM_JOB_ID", 0) + 997 * _int(environment, "SLURM_STEP_ID", 0)) % 10000
    return Launched(
        launcher="srun",
        rank=_int(environment, "SLURM_PROCID"),
        world_size=_int(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_int(environment, "SLURM_LOCALID"),
        nodes=nodes,
        address=environment.get("MASTER_ADDR", address),
        port=_int(environment, "MASTER_PORT", port),
        variables=("SLURM_STEP_NUM_TASKS",),
    )


def _first_node(nodes: str) -> str:
    """Return the first of the nodes in Slurm's notation: ``a[05-07,9],b`` → ``a05``."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _is_interactive_shell(environment: Mapping[str, str]) -> bool:
    """True in a shell of ``srun --pty``, which has the variables of a process of srun.

    A step that is started in such a shell inherits ``SLURM_PTY_PORT``, but its tasks have no terminal.
    """
    if "SLURM_PTY_PORT" not in environment:
        return False
    task = _int(environment, "SLURM_TASK_PID", 0)
    return task != os.getpid() and _has_terminal(task)


def _has_terminal(pid: int) -> bool:
    try:
        terminal = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4]
    except OSError:
        return True  # it has ended: a terminal multiplexer has kept its variables
    return terminal != "0"


def _int(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        present = [key for key in environment if key.startswith("SLURM_STEP_")] or ["RANK", "WORLD_SIZE"]
        raise ValueError(
            f"the environment variable {name} is missing, which a launcher sets: if none has started this process, "
            f"unset {' '.join(sorted(present))}"
        )
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}={text}: this environment variable must be a whole number; unset it if no launcher has set it"
        ) from None
