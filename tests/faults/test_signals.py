"""Runs that a signal stops at any moment exit with its code, and end as if nothing had happened once started again."""

import signal

from bcos_train.runs.launch import SIGNALS

from .campaign import TENTHS, Campaign, Machine, assert_ends_equal, tenths
from .trials import STEP, Fault


@tenths
def test_stopped_at_any_moment(tenth: int, machine: Machine, campaign: Campaign) -> None:
    """By each signal in a step or a validation, by one of them, in turn, around each change of a file."""
    whole, result = machine.finished
    steps = [n for n, moment in enumerate(result.moments) if moment == f"{STEP} training_step"]
    points = [
        (n, signum)
        for n, moment in enumerate(result.moments)
        for i, signum in enumerate(SIGNALS)
        if moment.startswith(STEP) or n % len(SIGNALS) == i
    ]
    for n, signum in points[tenth::TENTHS]:
        name = signal.Signals(signum).name
        with campaign.trial(f"{name} before {n}: {result.moments[n]}"):
            run = machine.new()
            stopped = run.train(Fault(n, signum=signum))
            # In the last step and after it there is nothing left to stop.
            assert stopped.code == (0 if n >= steps[-1] else 128 + signum), stopped.output
            assert f"{name}: " in stopped.output
            assert "Traceback" not in stopped.output, stopped.output
            assert not list(run.folder.rglob("*.tmp"))
            assert_ends_equal(run, whole)
            machine.discard(run)


@tenths
def test_signals_before_the_run_begins(tenth: int, machine: Machine, campaign: Campaign) -> None:
    whole, _ = machine.finished
    for signum in SIGNALS[tenth::TENTHS]:
        with campaign.trial(signal.Signals(signum).name):
            run = machine.new()
            assert run.train(first=signum).code == 128 + signum
            assert_ends_equal(run, whole)
            machine.discard(run)
