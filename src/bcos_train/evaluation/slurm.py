"""Submits the training of rows of the Model Zoo to Slurm, one job a row."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcos_train.report.zoo_table import train_command

__all__ = ["SlurmOptions", "job_command", "submit"]


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What each job asks for. It has one task, which starts a process for each GPU itself.

    Args:
        gpus: GPUs, on one machine.
        cpus_per_gpu: Cores for each of them.
        hours: Time limit. A job that reaches it is submitted again by the same command, and goes on.
        memory_gb: Memory; ``None``: the cluster's default.
        partition, account: ``None``: the cluster's default.

    Raises:
        ValueError: A number below 1, or no time.
    """

    gpus: int = 4
    cpus_per_gpu: int = 8
    hours: float = 72
    memory_gb: float | None = None
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for option, value in {"--gpus": self.gpus, "--cpus-per-gpu": self.cpus_per_gpu}.items():
            if value < 1:
                raise ValueError(f"{option} {value}: at least 1")
        for option, number in {"--time": self.hours, "--memory": self.memory_gb}.items():
            if number is not None and number <= 0:
                raise ValueError(f"{option} {number:g}: more than 0")

    def parameters(self, name: str) -> dict[str, Any]:
        """For ``submitit.AutoExecutor.update_parameters``."""
        given = {
            "name": name,
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.gpus * self.cpus_per_gpu,
            "timeout_min": max(round(self.hours * 60), 1),
            "mem_gb": self.memory_gb,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
        }
        return {key: value for key, value in given.items() if value is not None}


def job_command(name: str, root: Path, gpus: int, settings: Sequence[str]) -> list[str]:
    """The command of a job.

    Args:
        name: The model.
        root: The folder of ``train.py``.
        gpus: Processes to start.
        settings: Further settings of ``train.py``.
    """
    script, *own = train_command(name)
    return [sys.executable, str(root / script), *own, f"trainer.devices={gpus}", *settings]


def submit(
    names: Sequence[str], options: SlurmOptions, root: Path, log_folder: Path, settings: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Submit a job for each row, to run in the present folder; gives row and number of each as it has been taken.

    Args:
        names: The models.
        options: What each job asks for.
        root: The folder of ``train.py``.
        log_folder: For each job's script and output, in a folder for each row.
        settings: Further settings of ``train.py``.

    Raises:
        ValueError: There is no Slurm here, or it takes no such job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--train submit: no Slurm here (there is no sbatch); --train print shows the commands")
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError as error:
        raise ValueError(f"--train submit needs submitit: pip install submitit ({error})") from error
    for name in names:
        command = submitit.helpers.CommandFunction(job_command(name, root, options.gpus, settings), cwd=Path.cwd())
        try:
            executor = submitit.AutoExecutor(folder=log_folder / name, cluster="slurm")
            executor.update_parameters(**options.parameters(name))
            yield name, executor.submit(command).job_id
        except (FailedJobError, RuntimeError) as error:
            raise ValueError(f"--train submit: {name}: {' '.join(str(error).split())}") from error
