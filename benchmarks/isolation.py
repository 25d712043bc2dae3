"""Measurements in processes of their own, in which an error, a hang or a broken CUDA context stays."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Pair = tuple[str, Any]
#: A measurement yields what it has found as soon as it has found it, so that one that is cut short has said something.
Pairs = Iterator[Pair]

#: Yielded by a measurement that has prepared itself and waits for its turn.
READY: Pair = ("ready", True)

# The imports are shared. CUDA must not be used before the fork, so the parent never touches it.
CONTEXT = multiprocessing.get_context("fork")


class Isolated:
    """A measurement that runs in a forked process, the head of a process group of its own.

    Args:
        measure: Called there with the arguments; what it yields is passed on and must be picklable.
    """

    def __init__(self, measure: Callable[..., Pairs], *args: Any) -> None:
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(self._connection, theirs, measure, args))
        self._process.start()
        theirs.close()
        # Here and in the child: whichever comes first.
        with contextlib.suppress(OSError):
            os.setpgid(self._pid, self._pid)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def results(self, seconds: float, when_ready: Callable[[], None] = lambda: None) -> Pairs:
        """Pass on what the measurement yields until it ends; kill it when its time is up.

        ``when_ready`` is called before a measurement that is `READY` may proceed.
        """
        deadline = time.monotonic() + seconds
        while self._connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                pair = self._connection.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                if self._process.exitcode:
                    yield "error", f"the process ended with exit code {self._process.exitcode}"
                return
            if pair == READY:
                when_ready()
                with contextlib.suppress(BrokenPipeError):  # it has died since; the next turn says so
                    self._connection.send(None)
            else:
                yield pair
        self.kill()
        yield "error", f"stopped after {seconds:.0f} s"

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process and all that it has started."""
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)


def _run(parents: Connection, connection: Connection, measure: Callable[..., Pairs], args: tuple[Any, ...]) -> None:
    parents.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    try:
        for pair in measure(*args):
            connection.send(pair)
            if pair == READY:
                connection.recv()
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"[:500]))
        connection.send(("traceback", traceback.format_exc()[-2000:]))
