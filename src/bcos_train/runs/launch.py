"""Processes of a run: its signals, and restarting under torchrun."""

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

from bcos_train.runs.launcher import rank
from bcos_train.runs.orphans import GRACE, end_with_parent
from bcos_train.utils.atomic import atomic_write

#: Environment variable with the file in which rank 0 reports its pid and, at the end, its exit code to the process that
#: restarted the command.
REPORT = "BCOS_TRAIN_REPORT"
#: Signals that stop a run: Ctrl-C and Ctrl-\, a scheduler's request, the warnings of Slurm and submitit before the
#: time limit, and the end of the terminal.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)
)


def install_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle :data:`SIGNALS` by ``handler``, except a SIGHUP that ``nohup`` ignores; returns the previous handlers."""
    return {signum: signal.signal(signum, handler) for signum in SIGNALS if not _is_ignored_hangup(signum)}


def _is_ignored_hangup(signum: signal.Signals) -> bool:
    return signum.name == "SIGHUP" and signal.getsignal(signum) is signal.SIG_IGN


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle :data:`SIGNALS` by ``handler`` within the block, and restore the previous handlers afterwards."""
    previous = install_handlers(handler)
    try:
        yield
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)


def run_under_torchrun(module: str, config_path: Path, processes: int, arguments: Sequence[str] = ()) -> int:
    """Run ``python -m <module> <config_path> <arguments>`` in several processes.

    Signals are forwarded to rank 0 alone, which agrees with the other ranks on the step to stop at. torchrun would
    terminate them one by one.

    Returns:
        The exit code of the first process that crashed, or the one that rank 0 reported: 0 only if all ended well.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        command = [sys.executable, "-m", "bcos_train.runs.agent", "--standalone", "--nnodes=1"]
        command.append(f"--nproc-per-node={processes}")
        # torchrun takes its options from variables that begin with PET_, too: of another job, such as PyTorchJob's.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
        environment[REPORT] = str(report)
        # Divide the cores among the processes, unless the user has set the number of threads.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        command += ["-m", module, str(config_path), *arguments]
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        with _forwarding(child, report):
            code = shell_code(child.wait())
        lines = report.read_text().split() if report.exists() else []
        return code or (int(lines[1]) if len(lines) > 1 else 0)


def shell_code(code: int) -> int:
    """Return the exit code of a child process as shells do: 128 plus the signal number if a signal ended it."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _forwarding(child: "subprocess.Popen[bytes]", report: Path) -> Iterator[None]:
    def forward(signum: int, frame: FrameType | None) -> None:
        pid = int(report.read_text().split()[0]) if report.exists() else None
        with contextlib.suppress(ProcessLookupError):
            if pid is None:
                os.killpg(child.pid, signal.SIGTERM)
            else:
                os.kill(pid, signum)

    with signal_handler(forward):
        try:
            yield
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def report_pid() -> None:
    """Report the pid of rank 0 to the process that restarted the command, which forwards signals to it.

    If that process ends early, this one saves and ends, too.
    """
    if REPORT not in os.environ:
        return
    end_with_parent(GRACE)
    if rank() == 0:
        _write(f"{os.getpid()}")


def report_exit_code(code: int) -> int:
    """Report the exit code to the process that restarted the command, if any, and return the code to exit with.

    After a restart it is 0, because torchrun treats any other code as a crash.
    """
    if REPORT not in os.environ:
        return code
    if rank() == 0:
        _write(f"{os.getpid()} {code}")
    return 0


def _write(text: str) -> None:
    # The folder is missing if the process that waits for the report has ended.
    with contextlib.suppress(FileNotFoundError), atomic_write(Path(os.environ[REPORT])) as temporary:
        temporary.write_text(text)
