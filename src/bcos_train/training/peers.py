"""The processes of a run start together, and when one of them fails, the others end.

They talk through a key-value store (torch's ``TCPStore``) beside the process group: collective operations would only
return once all processes take part, which one that has failed never does.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from bcos_train.config import UserError
from bcos_train.runs import launch
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.launcher import Launched
from bcos_train.runs.orphans import GRACE
from bcos_train.training.module import NonFiniteLoss
from bcos_train.utils.terminal import print_line

__all__ = ["PeerFailed", "joined"]

#: Seconds after which a process says for whom it waits at the start, and after which it gives up.
NOTICE, TIMEOUT = 30.0, 600.0
#: Seconds between two looks at the store while waiting at the start, and during the run.
_POLL_START, _POLL = 0.1, 0.5

#: Exit code if another process has ended without a word.
_LOST = 1
#: Runs of this process so far: the jobs of a sweep share a store.
_runs = itertools.count()


class PeerFailed(Exception):
    """Another process of the run has failed, which has reported it. ``exit_code`` is that of the run."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@contextlib.contextmanager
def joined(place: Launched | None, stop: StopFlag | None = None) -> Iterator[None]:
    """Wait for the other processes of the run, and end with them if one fails within the block.

    A process whose exception is a consequence of another's, or the same as rank 0's, raises :class:`PeerFailed`
    instead. One that hangs, since it waits for the process that failed, is ended after some seconds.

    Args:
        place: ``None``: there are no others.
        stop: Ends the waiting with :class:`Interrupted` upon a signal.

    Raises:
        UserError: A process is missing after :data:`TIMEOUT` seconds, or the address can't be used.
    """
    if place is None or place.world_size == 1:
        yield
        return
    waiting = contextlib.nullcontext if stop is None else partial(stop.responding, "stopping before training starts")
    with waiting():
        peers = _Peers(place, _connect(place, stop), stop)
    try:
        with waiting():
            peers.join()
        yield
    except (Interrupted, PeerFailed):
        raise  # all processes have agreed on it, or know of it
    except BaseException as error:
        code = peers.fail(error)
        if code is not None:
            raise PeerFailed(code) from error
        if place.rank > 0 and isinstance(error, UserError):
            print_line(f"rank {place.rank}: {error}")  # commands print those of rank 0 alone
        raise
    finally:
        peers.leave()


def _connect(place: Launched, stop: StopFlag | None) -> dist.Store:
    """Connect to the store at rank 0's address; rank 0 creates it, unless torchrun has."""
    is_host = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    problem = ""

    def is_there() -> bool:
        nonlocal problem
        try:
            # Not by the store, which waits for its server in C++ code, where Python handles no signals.
            socket.create_connection((place.address, place.port), timeout=5).close()
        except OSError as error:
            problem = f" ({error.strerror or error})"
            return False
        return True

    if not is_host:
        whom = "rank 0" if place.rank else "torchrun"
        _wait(is_there, lambda: f"{whom}{problem}", place, stop)
    try:
        store = dist.TCPStore(
            place.address,
            place.port,
            is_master=is_host,
            timeout=timedelta(seconds=TIMEOUT),
            wait_for_workers=False,
            multi_tenant=True,  # the process group's store is served at the same address
        )
    except dist.DistError as error:
        message = " ".join(str(error).split())
        raise UserError(f"rank 0 can't listen at {place.host}: {message}") from error
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its processes
    return dist.PrefixStore(f"bcos_train/{restarts}/{next(_runs)}", store)


def _wait(
    condition: Callable[[], bool],
    whom: Callable[[], str],
    place: Launched,
    stop: StopFlag | None,
    is_reported: bool = False,
) -> None:
    """Wait until a condition holds; say for whom after :data:`NOTICE` seconds, unless another process does."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        if stop is not None and stop.signum is not None:
            raise Interrupted(stop.signum)
        waiting = f"rank {place.rank} of {place.world_size} has waited {waited:.0f} s for {whom()} at {place.host}"
        if waited > TIMEOUT:
            raise UserError(f"{waiting}; {place.hint}")
        if waited > NOTICE and not is_reported:
            print_line(f"{waiting} and waits up to {TIMEOUT / 60:.0f} min; {place.hint}")
            is_reported = True
        time.sleep(_POLL_START)


class _Peers:
    """This process's side of the store.

    Keys: ``joined/<rank>`` and ``left/<rank>`` at the start and the end of a process; ``failed/<rank>``, the message of
    its error; ``failed``, rank and exit code of the first process that failed.
    """

    def __init__(self, place: Launched, store: dist.Store, stop: StopFlag | None) -> None:
        self.place, self.store, self.stop = place, store, stop
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        #: How long the host of the store waits for the others to leave.
        self._patience = TIMEOUT

    def join(self) -> None:
        """Wait until all processes have joined, then begin to watch for one that fails."""
        self.store.set(f"joined/{self.place.rank}", "")

        def missing() -> str:
            ranks = self._missing("joined")
            return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

        def is_over() -> bool:
            return self.store.check(["failed"]) or not self._missing("joined")

        try:
            _wait(is_over, missing, self.place, self.stop, is_reported=self.place.rank > 0)
            if self.store.check(["failed"]):
                raise PeerFailed(self._failure()[1])
        except Interrupted as error:
            self.fail(error)
            raise
        except dist.DistError as error:
            raise UserError(f"rank {self.place.rank} lost the connection to rank 0 at {self.place.host}") from error
        self._watcher.start()

    def leave(self) -> None:
        """End the watch. The host of the store stays until the others have left, because they need it."""
        self._is_over.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with contextlib.suppress(dist.DistError):
            self.store.set(f"left/{self.place.rank}", "")
            if self.place.rank == 0:
                _wait_at_most(self._patience, lambda: self._is_stopped() or not self._missing("left"))
                _wait_at_most(GRACE, lambda: not self._missing("left"))

    def fail(self, error: BaseException) -> int | None:
        """Tell the others about an exception; ``None``: this process reports it, else the run's exit code."""
        self._patience = GRACE
        with contextlib.suppress(dist.DistError):
            if _is_lost_connection(error):
                # Usually because a process has failed, which tells the others; or was killed, which the launcher tells.
                _wait_at_most(GRACE, lambda: self.store.check(["failed"]) or self._is_stopped())
                if self.store.check(["failed"]):
                    return self._failure()[1]
                return _LOST if self._is_stopped() else None
            code = _exit_code(error)
            self.store.set(f"failed/{self.place.rank}", str(error))
            self.store.compare_set("failed", "", f"{self.place.rank} {code}")
            has_rank_zero_failed = self.place.rank > 0 and _wait_at_most(1.0, lambda: self.store.check(["failed/0"]))
            if has_rank_zero_failed and self.store.get("failed/0").decode() == str(error):
                return code  # a mistake that all processes find
        return None

    def _watch(self) -> None:
        try:
            while not self.store.check(["failed"]):
                if self._is_over.wait(_POLL):
                    return
            rank, code = self._failure()
        except dist.DistError:
            rank, code = 0, _LOST  # rank 0, whose store it was, has ended
        if rank == self.place.rank or self._is_over.wait(GRACE):
            return
        # The main thread waits for the process that failed, perhaps for half an hour.
        with contextlib.suppress(dist.DistError):
            self.store.set(f"left/{self.place.rank}", "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(launch.report_exit_code(code))

    def _failure(self) -> tuple[int, int]:
        rank, code = self.store.get("failed").split()
        return int(rank), int(code)

    def _is_stopped(self) -> bool:
        return self.stop is not None and self.stop.signum is not None

    def _missing(self, what: str) -> list[int]:
        return [rank for rank in range(self.place.world_size) if not self.store.check([f"{what}/{rank}"])]


def _wait_at_most(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_START)
    return holds


def _exit_code(error: BaseException) -> int:
    if isinstance(error, (Interrupted, NonFiniteLoss)):
        return error.exit_code
    if isinstance(error, UserError):
        return 2
    return 128 + signal.SIGINT if isinstance(error, (KeyboardInterrupt, SystemExit)) else 1


def _is_lost_connection(error: BaseException) -> bool:
    """True if a collective operation failed, as it does when another process has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "ncclSystemError"))
