"""Restarting a command under torchrun: exit codes, signals, and no processes left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcos_train.runs.launch import REPORT, report_exit_code, shell_code

#: A run in a few lines: rank 0 reports, all ranks write their pid, and end as the arguments say.
TOY = """
import os, signal, sys, time
from pathlib import Path
from bcos_train.runs.interrupt import StopFlag
from bcos_train.runs import launch

folder, rank = Path(sys.argv[1]).parent, launch.rank()
launch.report_pid()
stop = StopFlag()
with stop.handling_signals():
    (folder / f"rank{rank}").write_text(str(os.getpid()))
    end = dict(argument.split("=") for argument in sys.argv[2:]).get(f"rank{rank}")
    while not all((folder / f"rank{r}").exists() for r in range(2)):
        time.sleep(0.05)
    if end is not None and end.startswith("-"):
        os.kill(os.getpid(), -int(end))
    if end is not None:
        sys.exit(launch.report_exit_code(int(end)) if rank == 0 else int(end))
    deadline = time.monotonic() + 60
    while stop.signum is None and not (folder / "saved0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / f"saved{rank}").touch()
    sys.exit(launch.report_exit_code(128 + (stop.signum or 0)))
"""
COMMAND = """
import sys
from pathlib import Path
from bcos_train.runs.launch import run_under_torchrun
sys.exit(run_under_torchrun("toy_run", Path(sys.argv[1]), 2, sys.argv[2:]))
"""


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The command in a session of its own; when it is entered both ranks run."""
    (folder / "toy_run.py").write_text(TOY)
    path = os.pathsep.join([str(folder), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder / "config.yaml"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: all((folder / f"rank{rank}").exists() for rank in range(2)), 120)
        yield process
    finally:
        process.kill()
        for rank in range(2):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"rank{rank}").read_text()), signal.SIGKILL)


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def pids(folder: Path) -> list[int]:
    wait_for(lambda: all((folder / f"rank{rank}").read_text() for rank in range(2)), 10)
    return [int((folder / f"rank{rank}").read_text()) for rank in range(2)]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), (-9, 137), (-15, 143)])
def test_exit_codes_of_signals_are_those_of_a_shell(code: int, expected: int) -> None:
    assert shell_code(code) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(("rank0=0", "rank1=0"), 0, "", marks=pytest.mark.slow),
        (("rank0=0", "rank1=5"), 5, "process 1 of the run ended early (exit code 5)"),
        (("rank0=2", "rank1=0"), 2, ""),
        (("rank1=-9",), 137, "process 1 of the run ended early (killed by SIGKILL)"),
    ],
    ids=["both end well", "rank 1 fails at the end", "rank 0 reports a mistake", "rank 1 is killed"],
)
def test_the_exit_code_is_zero_only_if_all_ended_well(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    with started(tmp_path, *arguments) as process:
        _, errors = process.communicate(timeout=90)
    assert process.returncode == code
    assert message in errors
    assert len([line for line in errors.splitlines() if "SIGTERM: saving" not in line and line]) <= 1, errors


@needs_proc
def test_processes_end_with_the_command(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        ranks = pids(tmp_path)
        agent = parent_of(ranks[0])
        process.kill()
        wait_for(lambda: all(map(is_gone, [agent, *ranks])), 6)
    assert (tmp_path / "saved0").exists()


@needs_proc
def test_a_killed_agent_ends_the_run(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        ranks = pids(tmp_path)
        os.kill(parent_of(ranks[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        wait_for(lambda: all(map(is_gone, ranks)), 6)
    assert process.returncode == 137
    assert "Traceback" not in errors


@needs_proc
@pytest.mark.parametrize("signum", [signal.SIGUSR1, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_of_a_job(signum: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path) as process:
        ranks = pids(tmp_path)
        for pid in (process.pid, parent_of(ranks[0]), *ranks):
            os.kill(pid, signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_to_the_command_alone(signum: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path) as process:
        pids(tmp_path)
        process.send_signal(signum)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signum


def test_nobody_waits_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORT, str(tmp_path / "gone" / "report"))
    assert report_exit_code(138) == 0
