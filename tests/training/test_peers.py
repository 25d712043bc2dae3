"""Processes that wait for each other, and end together; here they are threads."""

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from bcos_train.config import UserError
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.launcher import Launched
from bcos_train.training import peers
from bcos_train.training.peers import PeerFailed, joined


@pytest.fixture(autouse=True)
def several_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_runs", itertools.repeat(0))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def place(rank: int, port: int, size: int = 2) -> Launched:
    return Launched("srun", rank, size, rank, 1, "127.0.0.1", port, ("SLURM_STEP_NUM_TASKS",))


def run(port: int, *bodies: Callable[[], Any]) -> list[BaseException | None]:
    """Run one body per rank, once all ranks have joined; returns their exceptions."""
    errors: list[BaseException | None] = [None] * len(bodies)
    # A rank that fails at once ends those that still look whether all have joined.
    barrier = threading.Barrier(len(bodies))

    def process(rank: int) -> None:
        try:
            with joined(place(rank, port)):
                barrier.wait(60)
                bodies[rank]()
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def fail(error: BaseException, after: float = 0.0) -> Callable[[], None]:
    def body() -> None:
        time.sleep(after)
        raise error

    return body


def test_one_process_waits_for_nobody() -> None:
    with joined(None), joined(Launched("torchrun", 0, 1, 0, 1, "127.0.0.1", 1, ())):
        pass


def test_all_end_well(port: int) -> None:
    assert run(port, lambda: None, lambda: time.sleep(0.3)) == [None, None]


def test_a_mistake_of_all_is_reported_by_rank_zero(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(port, fail(UserError("no images"), 0.3), fail(UserError("no images")))
    assert isinstance(first, UserError)
    assert isinstance(second, PeerFailed)
    assert second.exit_code == 2
    assert capsys.readouterr().err == ""


def test_a_mistake_of_another_rank_is_reported_there(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    first, second = run(port, fail(lost, 0.3), fail(UserError("cannot read the image a.png")))
    assert isinstance(first, PeerFailed)
    assert first.exit_code == 2
    assert isinstance(second, UserError)
    assert capsys.readouterr().err == "rank 1: cannot read the image a.png\n"


def test_a_process_that_hangs_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, codes = threading.Event(), []

    def exit_process(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(peers, "GRACE", 0.5)
    first, _ = run(port, fail(OSError("disk full")), lambda: ended.wait(30))
    assert isinstance(first, OSError)
    assert codes == [1]


def test_a_bug_keeps_its_traceback(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GRACE", 0.5)
    first, second = run(port, fail(RuntimeError("NCCL error: unhandled system error")), lambda: time.sleep(1))
    assert isinstance(first, RuntimeError)
    assert second is None


def test_rank_zero_says_for_whom_it_waits(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "NOTICE", 0.2)
    monkeypatch.setattr(peers, "TIMEOUT", 0.6)
    message = f"rank 0 of 2 has waited 1 s for rank 1 at 127.0.0.1:{port}; if srun has started nothing, unset"
    with pytest.raises(UserError, match=message), joined(place(0, port)):
        raise AssertionError
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rank 0 of 2 has waited 0 s for rank 1 at 127.0.0.1:{port} and waits up to ")
    assert line.endswith("; if srun has started nothing, unset SLURM_STEP_NUM_TASKS")


def test_others_say_that_rank_zero_is_missing(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT", 0.3)
    message = r"rank 1 of 2 has waited .* for rank 0 \(Connection refused\) at 127.0.0.1"
    with pytest.raises(UserError, match=message), joined(place(1, port)):
        raise AssertionError


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_waiting(rank: int, port: int) -> None:
    stop = StopFlag()
    stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted) as caught, joined(place(rank, port), stop):
        raise AssertionError
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_waiting_saves_nothing(rank: int, port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopFlag().handling_signals() as stop:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted), joined(place(rank, port), stop):
            raise AssertionError
    assert capfd.readouterr().err == "\nSIGINT: stopping before training starts (Ctrl-C again stops immediately)\n"
    assert stop.response == "saving after the first step, then stopping"


@pytest.mark.parametrize("is_stopped", [False, True], ids=["gives up", "is stopped"])
def test_those_that_wait_end_with_one_that_gives_up(
    is_stopped: bool, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three processes, one is missing, and one gives up or is stopped while it waits."""
    monkeypatch.setattr(peers, "TIMEOUT", 30 if is_stopped else 2)
    monkeypatch.setattr(peers, "GRACE", 5)
    errors: dict[int, BaseException] = {}
    stop = StopFlag()

    def process(rank: int) -> None:
        try:
            with joined(place(rank, port, size=3), stop if rank == 1 else None):
                raise AssertionError
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(1)
    if is_stopped:
        stop.signum = signal.SIGTERM
    for thread in threads:
        thread.join(60)
    first, second = (1, 0) if is_stopped else (0, 1)
    assert isinstance(errors[first], Interrupted if is_stopped else UserError)
    other = errors[second]
    assert isinstance(other, PeerFailed)
    assert other.exit_code == (143 if is_stopped else 2)


def test_an_address_in_use(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(UserError, match=f"rank 0 can't listen at 127.0.0.1:{port}: "), joined(place(0, port)):
            raise AssertionError
