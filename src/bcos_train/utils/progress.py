"""Progress of long work outside of the training."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bcos_train.utils.console import make_console

__all__ = ["Report", "show_progress"]

#: Seconds between progress lines if the output is not a terminal.
LINE_SECONDS = 60


class Report(Protocol):
    """Takes the number of steps that are done and of all steps, and what is being done."""

    def __call__(self, done: int, total: int, what: str = "") -> None: ...


@contextmanager
def show_progress(name: str) -> Iterator[Report]:
    """Show progress and remaining time: a bar in a terminal, otherwise one line per minute.

    Args:
        name: Of the work.
    """
    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # Steps may differ in speed by orders of magnitude: estimate over the whole time, not the last seconds.
    period = 1e9
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=period
    ) as display:
        task = display.add_task(name, total=None)
        printed_at = time.monotonic()

        def report(done: int, total: int, what: str = "") -> None:
            nonlocal printed_at
            if display.tasks[0].total is None:
                # What was done before an interruption took no time in this process.
                display.reset(task, completed=done, total=total)
            display.update(task, description=f"{name}: {what}" if what else name, completed=done)
            if not console.is_terminal and time.monotonic() - printed_at >= LINE_SECONDS:
                printed_at = time.monotonic()
                left = display.tasks[0].time_remaining
                ending = "" if left is None else f", about {math.ceil(left / 60)} min left"
                console.print(f"{name}: {done} of {total}{ending}", soft_wrap=True)

        yield report
