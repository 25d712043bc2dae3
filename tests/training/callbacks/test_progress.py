"""Progress: a bar in a terminal, lines elsewhere, and the time that is left."""

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from rich.console import Console

from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.layout import read_metrics
from bcos_train.training.callbacks import progress
from bcos_train.training.callbacks.checkpoint import Checkpointer, Checkpointing
from bcos_train.training.callbacks.progress import ProgressDisplay, duration
from bcos_train.training.module import NonFiniteLoss

from ..test_module import SometimesBad
from ..toys import fit, make_data, make_module


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0:00"),
        (0, "0:00"),
        (0.4, "0:00"),
        (0.5, "0:01"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (86399, "23:59:59"),
        (86400, "1 d 00:00:00"),
        (3 * 86400 + 3723, "3 d 01:02:03"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """Ten seconds a batch: moves when a batch ends."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Tick(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += 10


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, line_every_s: float = 0.0, **options: Any) -> list[str]:
    """The lines that go to a file."""
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    display = ProgressDisplay(Console(file=file, width=40), line_every_s=line_every_s)
    fit(folder, Tick(clock), display, **options)
    return file.getvalue().splitlines()


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of three batches; 6 batches at 10 s each."""
    lines = shown(tmp_path, monkeypatch)
    assert len(lines) == 8, "one for each batch and each epoch, not broken at the console's width"
    rows = read_metrics(tmp_path / "metrics.csv")
    places = [*((1, n) for n in (1, 2, 3)), None, *((2, n) for n in (1, 2, 3)), None]
    etas = ["0:50", "0:40", "0:30", "0:30", "0:20", "0:10", "0:00", "0:00"]
    steps = iter(rows)
    for line, place, eta in zip(lines, places, etas, strict=True):
        assert line.endswith(f"ETA {eta}")
        if place is not None:
            epoch, batch = place
            loss = next(steps)["train/loss_step"]
            assert line.startswith(f"epoch {epoch}/2  batch {batch}/3  loss {loss:.4g}  ")
    for n, line in ((1, lines[3]), (2, lines[7])):
        row = rows[3 * n - 1]
        assert line.startswith(f"epoch {n}/2  ")
        for label, key in {
            "train loss": "train/loss",
            "acc1": "train/acc1",
            "val loss": "val/loss",
            "val acc1": "val/acc1",
        }.items():
            assert re.search(rf"  {label} +{re.escape(f'{row[key]:.4g}')}  ", line), (label, line)


def test_lines_come_at_most_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(tmp_path, monkeypatch, line_every_s=20)
    assert [line.partition("  ")[2].split("  ")[0] for line in lines if "batch" in line] == ["batch 2/3", "batch 2/3"]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_time_left_after_resuming(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace is that of the batches done since, not of all."""
    stop = StopFlag()

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            stop.signum = 15 if trainer.global_step == stop_at - 1 else None

    with pytest.raises(Interrupted):
        fit(tmp_path, Ask(), Checkpointer(tmp_path, Checkpointing(), stop))
    lines = shown(tmp_path, monkeypatch, resume_from=tmp_path / "last.ckpt")
    left = 60 - 10 * stop_at - 10
    assert lines[0].endswith(f"ETA {duration(left)}"), lines[0]
    done = stop_at % 3
    assert lines[0].startswith(f"epoch {stop_at // 3 + 1}/2  batch {done + 1}/3")


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def text_of(console: Console) -> str:
    file: Any = console.file
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_bar(tmp_path: Path) -> None:
    console = terminal()
    display = ProgressDisplay(console)

    class Slow(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            time.sleep(0.15)  # the bar is drawn ten times a second

    fit(tmp_path, display, Slow(), epochs=1)
    assert display._bar is None
    text = text_of(console)
    assert re.search(r"epoch 1/1 .*[123]/3 loss 0\.\d+ +ETA 0:0\d", text)
    assert "val acc1" in text


@pytest.mark.parametrize("how", ["error", "interrupt", "diverged"])
def test_bar_is_stopped(how: str, tmp_path: Path) -> None:
    """A bar that is left running hides the cursor, and overwrites what is printed after it."""
    console = terminal()
    display = ProgressDisplay(console)
    data = make_data()

    class Fail(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if how != "diverged":
                raise {"error": ZeroDivisionError, "interrupt": KeyboardInterrupt}[how]

    module = make_module(data, loss=SometimesBad(at=1, value=float("nan")))
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit, NonFiniteLoss)):
        fit(tmp_path, display, Fail(), data=data, module=module)
    assert display._bar is None
    file: Any = console.file
    raw = file.getvalue()
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l"), "the cursor is shown again"
