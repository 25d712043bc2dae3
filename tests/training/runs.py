"""Small runs of the real thing for the tests."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train.config.composition import Composer
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import LAST
from bcos_train.training import Classifier

CONFIGS = Path(__file__).parents[2] / "configs"

#: Everything on that draws random numbers or keeps state between batches.
TINY = (
    "dataset.size=16",
    "limit_train=40",
    "limit_val=21",
    "batch_size=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "model.stochastic_depth_prob=0.3",
    "augmentation.mixup_alpha=0.2",
    "augmentation.cutmix_alpha=1.0",
    "schedule.interval=step",
    "schedule.warmup_steps=3",
    "ema={_target_: bcos_train.training.Ema, decay: 0.99, every_n_steps: 2}",
    "num_workers=0",
    "explanation=none",
)


def compose(runs: Path, *overrides: str, name: str = "train") -> dict[str, Any]:
    """The real configs with overrides, as the doors hand them on."""
    from bcos_train.config import to_container

    composed = Composer(CONFIGS).compose(
        name, [f"++{text}" if "=" in text and "." in text else text for text in overrides]
    )
    plain: dict[str, Any] = to_container(composed)
    return {**plain, "runs": str(runs)}


def run_folder(runs: Path) -> Path:
    (folder,) = [path.parent for path in runs.rglob("config.yaml")]
    return folder


def metric_rows(folder: Path) -> list[dict[str, str]]:
    """All of ``metrics.csv`` but the throughput, which no two runs share."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def final_state(folder: Path) -> dict[str, Any]:
    return files.load(folder / "checkpoints" / LAST)


def assert_same_state(a: Any, b: Any, path: str = "") -> None:
    """Bit-equal tensors and equal values throughout."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def signal_at(monkeypatch: pytest.MonkeyPatch, batch: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the ``batch``-th training batch from now (counted from 0)."""
    original, seen = Classifier.training_step, iter(range(10**6))

    def training_step(self: Classifier, *args: Any) -> torch.Tensor:
        if next(seen) == batch:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", training_step)
