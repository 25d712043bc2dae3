"""Loaders: bit-equal with any number of workers, resumable, counted; what Lightning calls reaches the sampler."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _set_sampler_epoch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bcos_train.augmentation import digits_train, plain
from bcos_train.dataset import Digits, ImageSizeMismatch, SeededDataset
from bcos_train.dataset.data_module import DataModule, _prefetch_factor
from bcos_train.dataset.randomness import seed_generators

Batch = tuple[Tensor, Tensor, Tensor]


def _module(**changes: object) -> DataModule:
    arguments = {
        "dataset": Digits(size=8),
        "train_transform": digits_train(),
        "eval_transform": plain(),
        "batch_size": 64,
        "limit_train": 200,
        "limit_val": 50,
        "seed": 3,
    }
    return DataModule(**{**arguments, **changes})


def _batches(loader: object) -> list[Batch]:
    return list(loader)  # type: ignore[call-overload]


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one[:3], other[:3], strict=True)
    )


class _UsesEveryGenerator:
    def __call__(self, image: Image.Image) -> Tensor:
        value = int(255 * (torch.rand(()).item() + random.random() + np.random.rand()) / 3)
        return torch.full((3, 4, 4), value, dtype=torch.uint8)


@pytest.mark.parametrize("transform", [digits_train(), _UsesEveryGenerator()], ids=["torch", "all generators"])
def test_workers_change_nothing(transform: object) -> None:
    serial, parallel = _module(train_transform=transform), _module(train_transform=transform, num_workers=2)
    loader, other = serial.train_dataloader(), parallel.train_dataloader()
    first = _batches(loader)
    assert _same(first, _batches(other))
    _set_sampler_epoch(loader, 1)
    _set_sampler_epoch(other, 1)
    second = _batches(loader)
    assert _same(second, _batches(other))
    assert not _same(first, second)
    assert [part.dtype for part in first[0][:3]] == [torch.uint8, torch.int64, torch.int64]


def test_generators_stay_as_they_are() -> None:
    module = _module()
    loaders = module.train_dataloader(), module.val_dataloader()
    seed_generators(0)
    expected = torch.rand(()), random.random(), np.random.rand()
    seed_generators(0)
    for loader in loaders:
        _batches(loader)
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


def test_one_sample_alone_equals_it_in_a_batch() -> None:
    samples = SeededDataset(Digits(size=8).train(), digits_train())
    keys = [(4, 99), (5, 7), (4, 1)]
    batch = samples.__getitems__(keys)
    assert all(torch.equal(image, samples[key][0]) for key, (image, *_) in zip(keys, batch, strict=True))
    assert not torch.equal(batch[0][0], batch[2][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_seek(workers: int) -> None:
    whole = _module()
    loader = whole.train_dataloader()
    _set_sampler_epoch(loader, 2)
    expected = _batches(loader)
    _set_sampler_epoch(loader, 3)
    following = _batches(loader)
    for before in (True, False):
        module = _module(num_workers=workers)
        if before:
            module.seek(2, 3)
        resumed = module.train_dataloader()
        if not before:
            module.seek(2, 3)
        _set_sampler_epoch(resumed, 2)
        assert _same(_batches(resumed), expected[3:])
        _set_sampler_epoch(resumed, 3)
        assert _same(_batches(resumed), following)


@pytest.mark.parametrize(("workers", "ahead"), [(0, None), (1, 4), (8, 4), (10, 3), (15, 2), (63, 2)])
def test_batches_loaded_ahead(workers: int, ahead: int | None) -> None:
    assert _prefetch_factor(workers) == ahead


def test_numbers() -> None:
    module = _module(limit_train=None, limit_val=None)
    module.prepare_data()
    module.setup("fit")
    assert (module.num_train, module.num_val, module.num_classes) == (1438, 359, 10)
    assert module.class_names[9] == "9"
    assert module.steps_per_epoch == len(module.train_dataloader()) == 23
    assert sum(len(labels) for _, labels, *_ in module.val_dataloader()) == 359


@pytest.mark.parametrize(
    "changes",
    [{}, {"drop_last": True}, {"repetitions": 3, "limit_train": 1000}, {"batch_size": 200}, {"accumulate": 4}],
    ids=str,
)
def test_steps_per_epoch_equals_the_samplers(changes: dict) -> None:
    module = _module(**changes)
    assert module.steps_per_epoch == module.train_dataloader().batch_sampler.steps_per_epoch


def test_limits_are_the_same_in_every_run() -> None:
    first, second = _module(seed=1), _module(seed=2)
    assert (first.num_train, first.num_val) == (200, 50)
    assert _same(_batches(first.val_dataloader()), _batches(second.val_dataloader()))
    assert _module(limit_val=10_000).num_val == 359
    # A fair sample, not the head of the data set.
    assert len({label for _, labels, *_ in first.val_dataloader() for label in labels.tolist()}) == 10


def test_training_samples_by_their_indices() -> None:
    module = _module(train_transform=_UsesEveryGenerator())
    state = torch.get_rng_state()
    images, labels = module.train_samples([3, 0, 3])
    assert torch.equal(torch.get_rng_state(), state)
    assert (images.shape, images.dtype) == ((3, 3, 4, 4), torch.uint8)
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, module.train_samples([3, 0, 3])[0])
    plain_ones, expected = _module(train_transform=plain(), seed=9).train_samples([3, 0, 3])
    assert torch.equal(labels, expected)
    assert plain_ones.shape == (3, 3, 8, 8)


def test_fixed_validation_samples() -> None:
    module = _module(num_workers=2)
    images, labels = module.fixed_val_samples(5)
    again, _ = _module(seed=9, batch_size=7).fixed_val_samples(5)
    assert torch.equal(images, again)
    everything = {
        image.numpy().tobytes(): label
        for batch in module.val_dataloader()
        for image, label, _ in zip(*batch[:3], strict=True)
    }
    assert [everything[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len(module.fixed_val_samples(500)[1]) == 50


class _Process:
    """The number of the process that loads."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.tensor(list(os.getpid().to_bytes(3, "big")), dtype=torch.uint8)[:, None, None]


@pytest.mark.parametrize("n", [1, 16, 17, 50])
def test_validation_samples_from_the_workers(n: int) -> None:
    """They are the main process's, in any order, and validations before and after them are whole."""
    indices = [i * 7 % 50 for i in range(n)]
    module = _module(num_workers=2)
    expected = _module().val_samples(indices)
    assert _same([module.val_samples(indices)], [expected])
    loader = module.val_dataloader()
    whole = _batches(_module().val_dataloader())
    for _ in range(2):
        assert _same([module.val_samples(indices)], [expected])
        assert _same(_batches(loader), whole)
    next(iter(loader))
    assert _same([module.val_samples(indices)], [expected])
    assert _same(_batches(loader), whole)


def test_many_validation_samples_are_not_loaded_in_the_main_process() -> None:
    module = _module(num_workers=2, eval_transform=_Process())
    module.val_dataloader()
    me = tuple(os.getpid().to_bytes(3, "big"))
    processes = {n: {tuple(image.flatten().tolist()) for image in module.val_samples(range(n))[0]} for n in (15, 50)}
    assert processes[15] == {me}
    assert len(processes[50]) == 2
    assert me not in processes[50]


def test_indices_name_the_samples() -> None:
    module = _module(train_transform=plain(), limit_train=None)
    train = Digits(size=8).train()
    images, labels, indices, *_ = next(iter(module.train_dataloader()))
    for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
        assert torch.equal(image, plain()(train[index][0]))
        assert label == train[index][1]


class _Probe(pl.LightningModule):
    """Records the labels of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated = 0

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append((self.current_epoch, batch[1].tolist()))
        return self.weight * 0

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated += len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_sets_the_epoch() -> None:
    module, probe = _module(), _Probe()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(probe, datamodule=module)
    loader = _module().train_dataloader()
    expected = []
    for epoch in range(2):
        _set_sampler_epoch(loader, epoch)
        expected += [(epoch, labels.tolist()) for _, labels, *_ in loader]
    assert probe.seen == expected
    assert probe.validated == 100


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_samples(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, validated = [], []
    for rank in range(world_size):
        monkeypatch.setattr(DataModule, "_world_size_and_rank", lambda self, rank=rank: (world_size, rank))
        module = _module(train_transform=plain())
        parts.append([labels for _, labels, *_ in module.train_dataloader()])
        loader = module.val_dataloader()
        assert loader.batch_sampler.batch_size == 64 // world_size
        validated += [labels for _, labels, *_ in loader]
    assert {len(part) for part in parts} == {4}
    assert sum(len(labels) for part in parts for labels in part) == 200
    assert sum(map(len, validated)) == 50


def test_too_few_validation_samples_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataModule, "_world_size_and_rank", lambda self: (4, 0))
    with pytest.raises(ValueError, match=r"3 validation sample\(s\) for 4 processes"):
        _module(limit_val=3).val_dataloader()


@pytest.mark.parametrize("name", ["batch_size", "num_workers", "seed", "repetitions", "accumulate", "limit_val"])
def test_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least [01], not -1"):
        _module(**{name: -1})


def test_uneven_split() -> None:
    with pytest.raises(ValueError, match=r"batch_size=64 does not split evenly.*multiple of 3, for instance 63 or 66"):
        _module(accumulate=3).train_dataloader()


class _Odd(torch.nn.Module):
    def forward(self, image: Image.Image) -> Tensor:
        return torch.zeros(3, 4, 4 + int(torch.randint(5, ())), dtype=torch.uint8)


def test_images_of_different_sizes() -> None:
    message = r"differ in size \(4×\d and 4×\d\): augmentation\.train must bring all"
    with pytest.raises(ImageSizeMismatch, match=message):
        _batches(_module(train_transform=_Odd()).train_dataloader())
    with pytest.raises(ImageSizeMismatch, match=message):
        _module(train_transform=_Odd()).train_samples(range(20))


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        (v2.Identity(), "Image"),
        (v2.ToImage(), None),
        (v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float)]), "float32"),
    ],
    ids=["image", "ok", "float"],
)
def test_output_of_a_transform_is_checked(transform: v2.Transform, got: str | None) -> None:
    samples = SeededDataset(Digits().train(), transform)
    if got is None:
        assert samples[0][0].shape == (3, 32, 32)
    else:
        with pytest.raises(ValueError, match=rf"must return a uint8 tensor \(3, H, W\), not .*{got}"):
            samples[0]


class _Threads:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.full((3, 1, 1), torch.get_num_threads(), dtype=torch.uint8)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system cannot tell who sent a signal")
def test_only_the_main_process_terminates_workers() -> None:
    loader = _module(train_transform=_Threads(), num_workers=1, batch_size=8).train_dataloader()
    iterator = iter(loader)
    images, *_ = next(iterator)
    assert (images == 1).all()
    (worker,) = iterator._workers
    for name in ("INT", "USR1", "USR2", "TERM"):
        subprocess.run(
            [sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.SIG{name})"], check=True
        )
    assert len(list(iterator)) == 24
    assert worker.is_alive()
    start = time.perf_counter()
    os.kill(worker.pid, 0)
    worker.terminate()
    worker.join(timeout=5)
    assert worker.exitcode == 0
    assert time.perf_counter() - start < 5
    assert worker not in multiprocessing.active_children()
