"""Runs that are killed at any moment and started again end as if nothing had happened."""

import json
import random
import signal
from pathlib import Path

import pytest

from .campaign import TENTHS, Campaign, Machine, assert_ends_equal, assert_equal, tenths
from .trials import Fault

RANDOM_KILLS = 40


@tenths
@pytest.mark.parametrize("state", ["new", "resumed"])
def test_killed_at_any_moment(state: str, tenth: int, machine: Machine, campaign: Campaign) -> None:
    whole, result = machine.finished
    moments = result.moments if state == "new" else machine.resumed.moments
    for n in range(tenth, len(moments), TENTHS):
        with campaign.trial(f"before {n}: {moments[n]}"):
            run = machine.new() if state == "new" else machine.copy(machine.interrupted)
            assert run.train(Fault(n, signal.SIGKILL)).code == 128 + signal.SIGKILL
            assert_ends_equal(run, whole)
            machine.discard(run)


@tenths
def test_killed_at_random_times(tenth: int, machine: Machine, campaign: Campaign) -> None:
    """Twice, by a timer that no code of the run can react to."""
    whole, _ = machine.finished
    for n in range(tenth, RANDOM_KILLS, TENTHS):
        times = [random.Random(100 * n + i).uniform(0.01, 1.0) for i in range(2)]
        with campaign.trial(f"after {times} s"):
            run = machine.new()
            for seconds in times:
                assert run.train(seconds=seconds).code in (0, 128 + signal.SIGALRM)
            assert_ends_equal(run, whole)
            machine.discard(run)


@tenths
def test_evaluation_killed_at_any_moment(tenth: int, machine: Machine, campaign: Campaign) -> None:
    whole, _ = machine.finished
    first = machine.copy(whole)
    result = first.evaluate()
    assert result.code == 0, result.output
    for n in range(tenth, len(result.moments), TENTHS):
        with campaign.trial(f"before {n}: {result.moments[n]}"):
            run = machine.copy(whole)
            assert run.evaluate(fault=Fault(n, signal.SIGKILL)).code == 128 + signal.SIGKILL
            again = run.evaluate()
            assert again.code == 0, again.output
            assert evaluation(run.folder) == evaluation(first.folder)
            assert not list(run.folder.rglob(".*.tmp"))
            machine.discard(run)


def evaluation(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "evaluation.json").read_text())
    return content | {"seconds": 0, "weights": Path(str(content["weights"])).name}


def test_every_kind_of_change_is_a_moment(machine: Machine) -> None:
    """Of a run: what is not seen is not tried."""
    kinds = {moment.partition(" ")[0] for moment in (*machine.finished[1].moments, *machine.resumed.moments)}
    expected = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "faults.fsync", "faults.step"}
    assert kinds == expected
    with pytest.raises(AssertionError):
        assert_equal(machine.interrupted, machine.finished[0])
