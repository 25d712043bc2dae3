"""Two processes, of which one is killed or stopped, end as if nothing had happened once started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from .campaign import Campaign, Machine, Run, assert_equal
from .trials import STEP, Fault, Result

ROOT = Path(__file__).parents[2]
#: Trials of the sweep; each takes some seconds.
MOMENTS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(machine: Machine) -> tuple[Run, Result]:
    """A run in two processes that nothing befell."""
    run = machine.new("trainer.devices=2")
    result = run.train(ranks=2)
    assert result.code == 0, result.output
    return run, result


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_process_at_any_moment(
    signum: signal.Signals, whole: tuple[Run, Result], machine: Machine, campaign: Campaign
) -> None:
    expected, result = whole
    steps = [n for n, moment in enumerate(result.moments) if moment == f"{STEP} training_step"]
    for n in range(0, len(result.moments), max(1, len(result.moments) // MOMENTS)):
        with campaign.trial(f"{signum.name} before {n}: {result.moments[n]}"):
            run = machine.new("trainer.devices=2")
            stopped = run.train(Fault(n, signum=signum), ranks=2)
            stops = signum == signal.SIGKILL or n < steps[-1]
            assert stopped.code == (128 + signum if stops else 0), stopped.output
            again = run.train(ranks=2)
            assert again.code == 0, again.output
            assert_equal(run, expected)
            machine.discard(run)


@cache
def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def started(run: Run) -> Iterator["subprocess.Popen[str]"]:
    """The command, which starts torchrun, as soon as it has trained a step."""
    command = [sys.executable, "-m", "bcos_train.run", str(run.config)]
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: list(run.base.glob("runs/*/*/*/metrics.csv")) or process.poll() is not None, 180)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def processes_of(command: int) -> dict[str, int]:
    """Return the command's processes by role."""
    by_parent: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            by_parent.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    (agent,) = by_parent[command]
    ranks = sorted(by_parent[agent])
    return {"command": command, "agent": agent, "a rank": ranks[0], "the other rank": ranks[-1]}


@pytest.mark.parametrize("victim", ["command", "agent", "a rank", "the other rank"])
def test_a_process_of_the_command_is_killed(
    victim: str, whole: tuple[Run, Result], machine: Machine, campaign: Campaign
) -> None:
    """No process is left 10 s later, and the command's exit code is that of a killed process."""
    with campaign.trial(victim):
        run = machine.new("trainer.devices=2", "trainer.max_epochs=2")
        with started(run) as process:
            processes = processes_of(process.pid)
            os.kill(processes[victim], signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
            code = process.returncode
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes.values()), 10)
        assert code == (-signal.SIGKILL if victim == "command" else 128 + signal.SIGKILL), output
        assert "Traceback" not in output, output
        again = run.train(ranks=2)
        assert again.code == 0, again.output
        assert_equal(run, whole[0])
