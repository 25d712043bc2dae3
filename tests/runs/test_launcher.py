"""Which environment variables come from a launcher, and which only look like it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bcos_train.runs import launcher
from bcos_train.runs.launcher import Launched, launched, mpi_processes, rank

#: Recorded in a task of ``srun -n 2 python …`` of Slurm 22.05.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "bash",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
}
#: The shell of ``salloc -n 2`` on a cluster with interactive steps.
SALLOC = {
    "SLURM_JOB_NAME": "interactive",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_PTY_PORT": "38975",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
}
#: The script of ``sbatch -n 2``.
SBATCH = {"SLURM_JOB_NAME": "b.sh", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_TASK_PID": "1"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29401",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in {*TORCHRUN, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_no_launcher() -> None:
    assert launched() is None
    assert rank() == 0


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, **TORCHRUN})  # started within a step
    place = launched()
    assert place == Launched("torchrun", 3, 4, 1, 2, "a", 29401, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    assert rank() == 3


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    place = launched()
    assert place == Launched("srun", 1, 2, 1, 1, "127.0.0.1", 15007, ("SLURM_STEP_NUM_TASKS",))
    assert place.hint == "if srun has started nothing, unset SLURM_STEP_NUM_TASKS"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[05,07-9],m3", "gpu05"), ("a,b", "a"), ("r[2]-x[3-4]", "r2-x[3-4]")],
)
def test_rank_zero_is_on_the_first_node(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes})
    place = launched()
    assert place is not None
    assert place.address == first


@pytest.mark.parametrize("variables", [SALLOC, SBATCH, {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "1"}])
def test_an_allocation_or_a_single_variable_is_no_launcher(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    assert launched() is None
    assert rank() == 0


def test_a_job_step_of_one_task_in_a_larger_job(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"})
    assert launched() is None


@pytest.fixture
def child() -> Iterator[int]:
    """The pid of a process without a terminal."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process.pid
    process.communicate(b"\n", timeout=30)


def test_the_shell_of_srun_pty(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, "SLURM_PTY_PORT": "34315", "SLURM_TASK_PID": str(os.getppid())})
    monkeypatch.setattr(launcher, "_has_terminal", lambda pid: pid == os.getppid())
    assert launched() is None
    # A command instead of a shell: the task is this process.
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    assert launched() is not None
    # A step that was started in the shell.
    monkeypatch.setenv("SLURM_TASK_PID", str(child))
    assert launched() is not None


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_processes_with_a_terminal(child: int) -> None:
    assert not launcher._has_terminal(child)
    assert launcher._has_terminal(2**22 + 1)  # ended long ago


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, but not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 contradict each other: start with torchrun, or "),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: this environment variable must be a whole number; unset it if no"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is missing, .*, unset SLURM_STEP_NUM_TASKS"),
    ],
)
def test_incomplete_variables(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        launched()
    assert rank() == 0  # prints the message


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "", "WORLD_SIZE": ""})
    assert launched() is None


def test_who_leaves_messages_to_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a process with left-over variables, which has nobody to print them."""
    set_all(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"})
    assert not launcher.follows_rank_zero()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launcher.follows_rank_zero()


def test_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mpi_processes() is None
    monkeypatch.setenv("PMI_SIZE", "1")
    assert mpi_processes() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert mpi_processes() == ("OMPI_COMM_WORLD_SIZE", 2)
