"""Disks that are full, damaged, read-only or not accessible: one line, and nothing is lost."""

import errno
import os

import pytest

from .campaign import (
    TENTHS,
    Campaign,
    Machine,
    Run,
    assert_ends_equal,
    assert_equal_weights,
    newest_step,
    tenths,
)
from .trials import FSYNC, STEP, Fault, Result

#: For each error, whether it lasts, and the operations that it doesn't affect.
ERRORS = {
    errno.ENOSPC: (True, (STEP, "os.remove", "os.rename")),
    errno.EIO: (False, (STEP,)),
    errno.EROFS: (True, (STEP, FSYNC)),
    errno.EACCES: (True, (STEP, FSYNC)),
}
#: Bytes that a file may have: from none to more than the largest one.
SIZES = [0, *(int(1.6**n) for n in range(34))]


def assert_one_line_or_success(result: Result, number: int) -> None:
    if result.code:
        assert result.code == 2, result.output
        assert os.strerror(number) in result.output, result.output
        assert result.is_one_line, result.output
    else:  # a gallery, or a folder that couldn't be flushed
        assert "Traceback" not in result.output, result.output


@tenths
@pytest.mark.parametrize("state", ["new", "resumed"])
def test_errors_at_any_moment(state: str, tenth: int, machine: Machine, campaign: Campaign) -> None:
    whole, result = machine.finished
    moments = result.moments if state == "new" else machine.resumed.moments
    for n in range(tenth, len(moments), TENTHS):
        # Each moment has an error of its own, in turn; those that hit no operation there are no trials.
        number = list(ERRORS)[(n + n // TENTHS) % len(ERRORS)]
        lasting, spared = ERRORS[number]
        if not lasting and moments[n].startswith(spared):
            continue
        with campaign.trial(f"{errno.errorcode[number]} before {n}: {moments[n]}"):
            run = machine.new() if state == "new" else machine.copy(machine.interrupted)
            before = newest_step(run)
            fault = Fault(n, errno=number, lasting=lasting, spared=spared)
            failed = run.train(fault)
            assert_one_line_or_success(failed, number)
            assert newest_step(run) >= before
            assert_room_helps(run, whole, failed)
            machine.discard(run)


@tenths
@pytest.mark.parametrize("state", ["new", "resumed"])
def test_full_at_any_size(state: str, tenth: int, machine: Machine, campaign: Campaign) -> None:
    """A limit on the size of files stands for the disk's: parts of files are written."""
    whole, _ = machine.finished
    for size in SIZES[tenth::TENTHS]:
        with campaign.trial(f"{size} bytes"):
            run = machine.new() if state == "new" else machine.copy(machine.interrupted)
            before = newest_step(run)
            failed = run.train(file_size=size)
            assert_one_line_or_success(failed, errno.EFBIG)
            assert newest_step(run) >= before
            assert_room_helps(run, whole, failed)
            machine.discard(run)


@tenths
def test_files_that_cannot_be_read(tenth: int, machine: Machine, campaign: Campaign) -> None:
    """Once; the run may resume from an older checkpoint, and keeps the one that it could not read."""
    whole, _ = machine.finished
    recorded = machine.copy(machine.interrupted)
    moments = recorded.train(Fault(reading=True)).moments
    for n in range(tenth, len(moments), TENTHS):
        if not moments[n].startswith("open ") or moments[n].endswith(".tmp"):
            continue
        with campaign.trial(f"EIO before {n}: {moments[n]}"):
            run = machine.copy(machine.interrupted)
            failed = run.train(Fault(n, errno=errno.EIO, reading=True))
            assert_one_line_or_success(failed, errno.EIO)
            again = run.train()
            assert again.code == 0, again.output
            assert_equal_weights(run, whole)
            machine.discard(run)


def assert_room_helps(run: Run, whole: Run, failed: Result) -> None:
    """Started again with the disk in order, the run ends as ``whole``."""
    if "gallery failed" not in failed.output:
        assert_ends_equal(run, whole)
    else:
        again = run.train()
        assert again.code == 0, again.output
        assert_equal_weights(run, whole)
