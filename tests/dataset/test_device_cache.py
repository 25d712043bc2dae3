"""A cached data set gives the batches that it gives without the cache, in every order, process and epoch."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _set_sampler_epoch
from PIL import Image
from torch import Tensor

from bcos_train.augmentation import crop_flip, digits_train, imagenet_eval, plain
from bcos_train.dataset import DeviceLoader, Digits, ImageFolder, NotCacheable, device_cache
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.randomness import seed_generators

Batch = tuple[Tensor, Tensor, Tensor]


def pair(**changes: Any) -> tuple[DataModule, DataModule]:
    """The same data module without and with the cache."""
    arguments = {
        "train_transform": crop_flip(8, 2),
        "eval_transform": plain(),
        "batch_size": 16,
        "limit_train": 100,
        "limit_val": 50,
        "seed": 3,
        **changes,
    }
    return DataModule(Digits(size=8), **arguments), DataModule(Digits(size=8, cache="device"), **arguments)


def assert_same(a: Any, b: Any, n: int) -> None:
    a, b = list(a), list(b)
    assert len(a) == len(b) == n
    for batch, other in zip(a, b, strict=True):
        for x, y in zip(batch[:3], other[:3], strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_transform": plain()},
        {"train_transform": plain(11), "eval_transform": imagenet_eval(12, 10)},
        {"repetitions": 3},
        {"accumulate": 2, "drop_last": True},
        {"num_workers": 2},
        {"limit_train": None, "limit_val": None},
    ],
    ids=str,
)
def test_same_batches(changes: dict[str, Any]) -> None:
    without, cached = pair(**changes)
    loader, other = without.train_dataloader(), cached.train_dataloader()
    assert isinstance(other, DeviceLoader)
    for epoch in (0, 1, 4):
        _set_sampler_epoch(loader, epoch)
        _set_sampler_epoch(other, epoch)
        assert_same(loader, other, len(loader))
    assert len(other) == len(loader)
    assert_same(without.val_dataloader(), cached.val_dataloader(), len(cached.val_dataloader()))


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_batches_prepared_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "_BATCHES_AT_ONCE", at_once)
    without, cached = pair()
    assert_same(without.train_dataloader(), cached.train_dataloader(), 7)


@pytest.mark.parametrize("before", [True, False])
def test_seek(before: bool) -> None:
    without, cached = pair()
    loader = without.train_dataloader()
    if before:
        cached.seek(2, 3)
    other = cached.train_dataloader()
    if not before:
        cached.seek(2, 3)
    for epoch, left_out in ((2, 3), (3, 0)):
        _set_sampler_epoch(loader, epoch)
        _set_sampler_epoch(other, epoch)
        assert_same(list(loader)[left_out:], other, 7 - left_out)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_samples(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(world_size):
        monkeypatch.setattr(DataModule, "_world_size_and_rank", lambda self, rank=rank: (world_size, rank))
        without, cached = pair()
        assert_same(without.train_dataloader(), cached.train_dataloader(), 7)
        loader = without.val_dataloader()
        assert_same(loader, cached.val_dataloader(), len(loader))


def test_samples_by_their_indices() -> None:
    without, cached = pair()
    for is_built in (False, True):
        if is_built:
            cached.val_dataloader()
        indices = [3, 0, 3, 7]
        assert_same([without.val_samples(indices)], [cached.val_samples(indices)], 1)
        assert_same([without.train_samples(indices)], [cached.train_samples(indices)], 1)
        assert_same([without.fixed_val_samples(9)], [cached.fixed_val_samples(9)], 1)


def test_generators_stay_as_they_are() -> None:
    _, cached = pair()
    seed_generators(0)
    expected = torch.rand(()), random.random(), np.random.rand()
    seed_generators(0)
    list(cached.train_dataloader())
    list(cached.val_dataloader())
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


def test_images_are_read_once() -> None:
    _, cached = pair()
    reads: list[int] = []
    part = cached._train_dataset()
    original = type(part).__getitem__
    cached._train = type(
        "Counting",
        (),
        {
            "__len__": lambda self: len(part),  # type: ignore[arg-type]
            "__getitem__": lambda self, index: (reads.append(index), original(part, index))[1],
        },
    )()
    for _ in range(2):
        loader = cached.train_dataloader()
        list(loader)
        list(loader)
    assert sorted(reads) == list(range(100))


class Probe(pl.LightningModule):
    """Records the labels and the sums of the pixels of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, int, list[int], int]] = []

    def record(self, part: str, batch: Batch) -> None:
        self.seen.append((part, self.current_epoch, batch[1].tolist(), int(batch[0].sum())))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.record("train", batch)
        return self.weight * 0

    def validation_step(self, batch: Batch, index: int) -> None:
        self.record("val", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_takes_the_loader() -> None:
    seen = []
    for data in pair(accumulate=2):
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        probe = Probe()
        trainer.fit(probe, datamodule=data)
        assert trainer.global_step == 14
        seen.append(probe.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * (14 + 4)


def test_transforms_are_refused_before_training() -> None:
    _, cached = pair(train_transform=digits_train())
    with pytest.raises(NotCacheable, match="RandomAffine"):
        cached.setup("fit")
    cached.setup("validate")
    assert len(list(cached.val_dataloader())) == 4


def image_folder(root: Path, sizes: list[tuple[int, int]]) -> ImageFolder:
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(root / part / "a" / f"{i:03d}.png")
    return ImageFolder(root, cache="device")


@pytest.mark.parametrize("n", [2, 65])
def test_images_of_several_sizes(n: int, tmp_path: Path) -> None:
    source = image_folder(tmp_path, [(8, 6)] * (n - 1) + [(8, 7)])
    for transform in (plain(), crop_flip(4, 0)):
        data = DataModule(source, transform, plain(4), batch_size=2)
        with pytest.raises(NotCacheable, match=r"cache=device needs images of one size, imagefolder \(training\) has"):
            data.train_dataloader()
        assert len(data.val_dataloader()) == -(-n // 2)
    assert len(DataModule(source, plain(4), plain(4), batch_size=2).train_dataloader()) == -(-n // 2)


def test_images_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cached = pair()
    needed = 100 * 12 * 12 * 3
    monkeypatch.setattr(device_cache, "_free_memory", lambda device: needed - 1)
    message = r"digits \(training\) needs 0\.0 GiB, 0\.0 GiB are free on cpu: omit the key"
    with pytest.raises(NotCacheable, match=message):
        cached.train_dataloader()
    for free in (needed, None):
        monkeypatch.setattr(device_cache, "_free_memory", lambda device, free=free: free)
        cached.train_dataloader()


def test_free_memory() -> None:
    free = device_cache._free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert device_cache._free_memory(torch.device("meta")) is None


def test_unknown_cache() -> None:
    with pytest.raises(ValueError, match="cache must be 'device' or None, not 'ram'"):
        DataModule(Digits(cache="ram"), plain(), plain(), batch_size=2)
