"""Runs for the campaigns, what has to be equal at their end, and the count of trials."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
from training.runs import assert_same_state, compose, final_state, metric_rows

from bcos_train.config import save
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import CHECKPOINTS, LOCK

from .trials import Fault, Result, Trial

#: Two epochs of three steps, with everything that draws random numbers, keeps state or writes files.
SETTINGS = (
    "dataset.size=8",
    "limit_train=24",
    "limit_val=8",
    "batch_size=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "model.stochastic_depth_prob=0.3",
    "augmentation.mixup_alpha=0.2",
    "schedule.interval=step",
    "schedule.warmup_steps=3",
    "ema={_target_: bcos_train.training.Ema, decay: 0.99, every_n_steps: 2}",
    "checkpointing.monitor=val/loss",  # falls, so that the best checkpoint changes
    "checkpointing.mode=min",
    "checkpointing.every_n_steps=2",
    "checkpointing.every_n_minutes=null",
    "num_workers=0",
    "explanation.metrics=[]",
    "explanation.gallery_images=1",
    "explanation.every_n_epochs=1",
)
TENTHS = 10
#: Every tenth trial in `make test`, the others in `make test-all`.
tenths = pytest.mark.parametrize("tenth", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, TENTHS))])
STATE = ("model", "model_ema", "optimizer_states", "lr_schedulers", "global_step", "epoch")


class Campaign:
    """Counts trials, and collects why some didn't hold."""

    def __init__(self) -> None:
        self.tried = 0
        self.failures: list[str] = []

    @contextlib.contextmanager
    def trial(self, label: str) -> Iterator[None]:
        self.tried += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"{label}: {type(error).__name__}: {str(error)[-1500:]}")
            print(f"did not hold: {self.failures[-1]}")

    def summary(self) -> str:
        return "\n\n".join([f"{len(self.failures)} of {self.tried} trials did not hold:", *self.failures])


@cache
def _config(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(Path("runs"), *SETTINGS, *overrides)


class Run:
    """A run in a folder of its own: ``runs/`` and the config that it was started with."""

    def __init__(self, folder: Path, start: Callable[[Trial], Result], overrides: tuple[str, ...] = ()) -> None:
        self.base, self.start, self.overrides = folder, start, overrides
        self.config = folder / "command.yaml"
        folder.mkdir(exist_ok=True)
        save({**_config(overrides), "runs": str(folder / "runs")}, self.config)

    @property
    def folder(self) -> Path:
        (path,) = (self.base / "runs").glob("*/*/*")
        return path

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def train(self, fault: Fault = Fault(), **options: Any) -> Result:  # noqa: B008
        return self.start(Trial(("train", str(self.config)), self.base / "runs", fault, **options))

    def train_saved_config(self) -> Result:
        """Resume with the config in the run folder."""
        return self.start(Trial(("train", str(self.folder / "config.yaml")), self.base / "runs"))

    def evaluate(self, *overrides: str, fault: Fault = Fault(), **options: Any) -> Result:  # noqa: B008
        command = ("evaluate", f"run={self.folder}", *overrides)
        return self.start(Trial(command, self.base / "runs", fault, **options))


class Machine:
    """Makes runs, and knows the one that nothing befell."""

    def __init__(self, folder: Path, start: Callable[[Trial], Result]) -> None:
        self.folder, self.start = folder, start
        self._count = 0

    def new(self, *overrides: str) -> Run:
        self._count += 1
        return Run(self.folder / str(self._count), self.start, overrides)

    def copy(self, run: Run) -> Run:
        copied = self.new(*run.overrides)
        shutil.copytree(run.base / "runs", copied.base / "runs")
        return copied

    @cached_property
    def finished(self) -> tuple[Run, Result]:
        """A run that nothing befell."""
        run = self.new()
        result = run.train()
        assert result.code == 0, result.output
        assert "failed" not in result.output
        return run, result

    @cached_property
    def interrupted(self) -> Run:
        """A run that was stopped in its second epoch; its last and previous checkpoints differ."""
        run = self.new()
        _, whole = self.finished
        steps = [i for i, moment in enumerate(whole.moments) if moment == "faults.step training_step"]
        result = run.train(Fault(steps[4], signum=15))
        assert result.code == 143, result.output
        return run

    @cached_property
    def resumed(self) -> Result:
        """How a copy of :attr:`interrupted` ends if nothing befalls it."""
        run = self.copy(self.interrupted)
        result = run.train()
        assert result.code == 0, result.output
        assert_equal(run, self.finished[0])
        return result

    def discard(self, run: Run) -> None:
        shutil.rmtree(run.base)


def assert_equal(run: Run, other: Run) -> None:
    """The same files, weights, state, metrics and summary, bit for bit."""
    assert _names(run) == _names(other)
    assert_equal_weights(run, other)
    assert metric_rows(run.folder) == metric_rows(other.folder)
    ours, theirs = (_without_times(r.folder / "summary.json") for r in (run, other))
    assert ours == theirs


def assert_ends_equal(run: Run, other: Run) -> None:
    """Started again, the run ends as ``other``."""
    result = run.train()
    assert result.code == 0, result.output
    assert_equal(run, other)


def assert_equal_weights(run: Run, other: Run) -> None:
    ours, theirs = final_state(run.folder), final_state(other.folder)
    for key in STATE:
        assert_same_state(ours[key], theirs[key], key)
    assert_equal_exports(run, other)


def assert_equal_exports(run: Run, other: Run) -> None:
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


def newest_step(run: Run) -> int:
    """Return the step of the newest valid checkpoint, -1 without any."""
    if not list((run.base / "runs").glob("*/*/*")):
        return -1
    newest, _ = files.newest_valid(run.checkpoints)
    return -1 if newest is None else int(files.load(newest)["global_step"])


def _names(run: Run) -> list[str]:
    return sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.name != LOCK)


def _without_times(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    content.pop("seconds_since_start_or_resume")
    content["metrics"].pop("images_per_second")
    return content
