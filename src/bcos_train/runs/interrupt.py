"""Graceful stop: after a signal, save at the end of the step and leave.

A signal handler may run between any two lines of the program, even in the middle of a step. So it only sets a flag: a
checkpoint saved in the handler could hold an inconsistent state.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from bcos_train.runs.launch import install_handlers, signal_handler
from bcos_train.runs.launcher import rank


class Interrupted(Exception):
    """Training stopped after saving. ``exit_code`` is 128 plus the signal number, as in shells."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class StopFlag:
    """Records a request to stop.

    Attributes:
        signum: The signal that requested the stop; ``None``: no request so far.
        immediate: True after Ctrl-C that followed another signal: stop without saving.
        response: What the run does next if a signal arrives now, for the message. The checkpoint callback keeps it up
            to date.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.immediate = False
        self.response = "saving after the first step, then stopping"

    @contextlib.contextmanager
    def responding(self, response: str) -> Iterator[None]:
        """Announce another response within the block."""
        before, self.response = self.response, response
        try:
            yield
        finally:
            self.response = before

    def install_handlers(self) -> None:
        """Install the signal handlers (again, after Lightning has installed its own)."""
        if threading.current_thread() is threading.main_thread():
            install_handlers(self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            self.immediate = True
            raise KeyboardInterrupt
        self.signum = signum
        if rank() == 0:
            name = signal.Signals(signum).name
            text = f"\n{name}: {self.response} (Ctrl-C again stops immediately)\n"
            # Not through sys.stderr, which may be in the middle of a write, or closed with its terminal.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator["StopFlag"]:
        """Handle signals within the block, and restore the previous handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        with signal_handler(self._handle):
            yield self
