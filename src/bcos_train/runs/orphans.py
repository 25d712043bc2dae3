"""End a process when its parent ends, however that happens."""

import os
import signal
import threading
import time

__all__ = ["GRACE", "end_with_parent"]

#: Seconds between two looks at the parent, and seconds that a run has to save once its parent has ended.
POLL, GRACE = 0.5, 3.0


def end_with_parent(grace: float = 0.0) -> None:
    """End this process when the process that started it has ended.

    A thread watches the parent's pid, since ``PR_SET_PDEATHSIG`` exists on Linux only.

    Args:
        grace: Seconds between a SIGTERM, upon which a run saves and stops, and the end; 0: end at once.
    """
    threading.Thread(target=_watch, args=(os.getppid(), grace), daemon=True).start()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    if grace:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
    os._exit(128 + signal.SIGTERM)
