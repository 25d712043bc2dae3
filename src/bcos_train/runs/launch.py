"""Several processes on one machine, by starting again under torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bcos_train.utils.atomic import replacing

#: Where rank 0 tells the process that started it its pid and, at the end, its exit code.
REPORT = "BCOS_TRAIN_REPORT"


#: Ctrl-C, the schedulers' polite stop, and what Slurm is usually told to send before the time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` answers :data:`SIGNALS` inside; afterwards they are answered as before."""
    before: dict[int, Any] = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def rank() -> int:
    """This process's rank as its launcher gave it; 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0") if _under_srun() else "0"))


def launched_world_size() -> int | None:
    """How many processes the launcher (torchrun, srun, submitit) started; ``None`` without one."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if _under_srun() else None


def _under_srun() -> bool:
    # A shell inside an allocation has SLURM_NTASKS too, but is no task of a step.
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ


def run_under_torchrun(module: str, config_path: Path, processes: int, arguments: Sequence[str] = ()) -> int:
    """Run ``python -m <module> <config_path> <arguments>`` in ``processes`` processes; the exit code of rank 0.

    A signal is passed on to rank 0 alone, which agrees with the others on the step to stop at. torchrun itself would
    end them one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, REPORT: str(report)}
        # As many threads as there are cores, shared out, unless the user has decided otherwise.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        command += ["-m", module, str(config_path), *arguments]
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        with _forwarding(child, report):
            code = child.wait()
        lines = report.read_text().split() if report.exists() else []
        return int(lines[1]) if len(lines) > 1 else code


@contextlib.contextmanager
def _forwarding(child: "subprocess.Popen[bytes]", report: Path) -> Iterator[None]:
    def forward(signum: int, frame: FrameType | None) -> None:
        pid = int(report.read_text().split()[0]) if report.exists() else None
        with contextlib.suppress(ProcessLookupError):
            if pid is None:
                os.killpg(child.pid, signal.SIGTERM)
            else:
                os.kill(pid, signum)

    with handling(forward):
        try:
            yield
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def report_pid() -> None:
    """Tell the process that started this one, if there is one, whom to pass signals to."""
    if rank() == 0 and REPORT in os.environ:
        _write(f"{os.getpid()}")


def exit_with(code: int) -> int:
    """The code to leave with: 0 under our own start, where torchrun would call any other a crash, with a report."""
    if REPORT not in os.environ:
        return code
    if rank() == 0:
        _write(f"{os.getpid()} {code}")
    return 0


def _write(text: str) -> None:
    with replacing(Path(os.environ[REPORT])) as temporary:
        temporary.write_text(text)
