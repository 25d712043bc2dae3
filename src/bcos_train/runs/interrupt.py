"""Leaving at the end of a batch when asked to stop.

A handler that does more than set a flag runs between any two lines of the program, also half-way through a step:
checkpoints saved there hold states that never were.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from bcos_train.runs.launch import SIGNALS, handling, rank


class Interrupted(Exception):
    """Training left after saving. ``exit_code`` is 128 + the signal's number, as a shell would give."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class StopFlag:
    """Which signal has asked for a stop; ``None`` as long as none has."""

    def __init__(self) -> None:
        self.signum: int | None = None
        #: Ctrl-C after a first signal
        self.at_once = False

    def install(self) -> None:
        """Take over the handlers. Called again once Lightning has put its own in their place."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt
        self.signum = signum
        if rank() == 0:
            name = signal.Signals(signum).name
            text = f"\n{name}: saving after this batch, then leaving (Ctrl-C again leaves at once)\n"
            # Not through sys.stderr, which may be in the middle of a write, or closed with its terminal.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    @contextlib.contextmanager
    def watching(self) -> Iterator["StopFlag"]:
        """The handlers are ours inside, and as before afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        with handling(self._handle):
            yield self
