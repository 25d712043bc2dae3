"""Run measurements in separate processes, so that an error, a hang or a broken CUDA context stays there."""

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
#: A measurement yields each result as soon as it has it, so that results remain if it is stopped.
Pairs = Iterator[Pair]

#: Yielded by a measurement that has finished its preparation and waits for its turn.
READY: Pair = ("ready", True)

# Forking shares the imports. CUDA must not be initialized before a fork, so the parent process never uses it.
CONTEXT = multiprocessing.get_context("fork")


class Isolated:
    """A measurement in a forked process, which leads its own process group.

    Args:
        measure: Called there with ``args``; the pairs that it yields must be picklable.
    """

    def __init__(self, measure: Callable[..., Pairs], *args: object) -> None:
        self._connection, child_connection = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(self._connection, child_connection, measure, args))
        self._process.start()
        child_connection.close()
        # In both processes, since either may run first.
        with contextlib.suppress(OSError):
            os.setpgid(self._pid, self._pid)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def results(self, seconds: float, when_ready: Callable[[], None] = lambda: None) -> Pairs:
        """Yield the measurement's results until it ends; kill it after ``seconds``.

        ``when_ready`` is called when the measurement is `READY`, before it proceeds.
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
                with contextlib.suppress(BrokenPipeError):  # the process has died; the next iteration reports it
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
        """Kill the process and all processes that it started."""
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)


def _run(
    parent_connection: Connection, connection: Connection, measure: Callable[..., Pairs], args: tuple[object, ...]
) -> None:
    parent_connection.close()
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
