"""A network and a data set small enough to train in milliseconds, under the real trainer and module."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from bcos_train.augmentation import plain
from bcos_train.dataset import BcosEncoding
from bcos_train.dataset.data_module import DataModule
from bcos_train.loss import BinaryCrossEntropy
from bcos_train.nn import BcosConv2d, make_norm
from bcos_train.schedule import Constant, Schedule
from bcos_train.task import Classification
from bcos_train.training import Classifier, TrainerOptions
from bcos_train.training.build import build_trainer
from bcos_train.training.callbacks.metrics import CsvLogger, TrainingLog

SIDE = 8


class TinyNet(nn.Module):
    """Two B-cos convolutions with a norm in between."""

    def __init__(self, num_classes: int = 4, norm: str = "bnu-linear") -> None:
        super().__init__()
        self.conv = BcosConv2d(6, 8, 3, padding=1)
        self.norm = make_norm(norm)(8)
        self.head = BcosConv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(self.norm(self.conv(x))).mean((2, 3)) - 1


class RandomImages(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    def __init__(self, n: int, num_classes: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
        self.labels = generator.integers(0, num_classes, n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


class RandomSource:
    """Random pixels and labels."""

    name = "random"

    def __init__(self, n_train: int = 24, n_val: int = 13, num_classes: int = 4) -> None:
        self.sizes, self.num_classes = (n_train, n_val), num_classes

    @property
    def class_names(self) -> list[str]:
        return [f"class {i}" for i in range(self.num_classes)]

    def prepare(self) -> None:
        pass

    def train(self) -> RandomImages:
        return RandomImages(self.sizes[0], self.num_classes, seed=0)

    def val(self) -> RandomImages:
        return RandomImages(self.sizes[1], self.num_classes, seed=1)


def make_data(source: RandomSource | None = None, **options: Any) -> DataModule:
    options = {"batch_size": 8, "seed": 1, **options}
    return DataModule(source or RandomSource(), train_transform=plain(), eval_transform=plain(), **options)


def make_module(
    data: DataModule,
    model: nn.Module | None = None,
    *,
    lr: float = 1e-2,
    epochs: int = 2,
    schedule: Schedule | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Classifier:
    if model is None:
        torch.manual_seed(0)
        model = TinyNet(data.num_classes)
    loss = options.pop("loss", BinaryCrossEntropy())
    options = {"task": Classification(loss), "eval_loss": BinaryCrossEntropy(), "log_every_n_steps": 1, **options}
    return Classifier(
        model,
        optimizer=partial(torch.optim.Adam, lr=lr) if optimizer is None else optimizer,
        schedule=Constant(epochs=epochs) if schedule is None else schedule,
        steps_per_epoch=data.steps_per_epoch,
        encoding=BcosEncoding(),
        **options,
    )


def make_trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, accumulate: int = 1, **options: Any) -> Any:
    """The trainer of a run, with ``metrics.csv`` in ``folder``."""
    trainer = build_trainer(
        TrainerOptions(max_epochs=epochs, accelerator="cpu", log_every_n_steps=1, **options), accumulate
    )
    trainer.loggers = [CsvLogger(folder)]
    trainer.callbacks += [TrainingLog(), *callbacks]  # type: ignore[attr-defined]
    return trainer


def fit(
    folder: Path,
    *callbacks: pl.Callback,
    data: DataModule | None = None,
    module: Classifier | None = None,
    epochs: int = 2,
    resume_from: Path | None = None,
    **options: Any,
) -> Classifier:
    """Train the toy, or resume it, and return the module."""
    data = make_data() if data is None else data
    module = make_module(data, epochs=epochs) if module is None else module
    trainer = make_trainer(folder, *callbacks, epochs=epochs, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    return module
