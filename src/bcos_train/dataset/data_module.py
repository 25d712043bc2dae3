"""The Lightning data module: exact, resumable loaders of uint8 batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, Subset

from bcos_train.dataset.base import ImageDataset, ImageSource
from bcos_train.dataset.device_cache import DeviceCache, DeviceLoader
from bcos_train.dataset.device_transform import DeviceTransform
from bcos_train.dataset.randomness import Stream, epoch_length, permutation
from bcos_train.dataset.sampler import EvalBatchSampler, TrainBatchSampler
from bcos_train.dataset.seeded import Collate, SeededDataset, Transform

__all__ = ["DataModule"]

#: Samples that are worth asking the worker processes for, which may have to be started first.
_MANY = 16

Loader = DataLoader[Any] | DeviceLoader
"""Of images uint8 (N,3,H,W), labels int64 (N,), indices in the data set int64 (N,)."""


class DataModule(pl.LightningDataModule):
    """Batches of images uint8 (N,3,H,W), labels (N,) and indices (N,), int64, for training and validation.

    Build the trainer with ``use_distributed_sampler=False``: the samplers here share the samples out themselves.

    Args:
        dataset: where the images come from; with ``dataset.cache == "device"`` they are kept on the trainer's device.
        train_transform: PIL image -> uint8 (3,H,W), may be random.
        eval_transform: PIL image -> uint8 (3,H,W), must not be random.
        batch_size: samples of one optimizer step, over all processes and accumulated micro-batches.
        num_workers: loading processes of each process; results do not depend on it.
        seed: of the epochs' orders and of the augmentation.
        repetitions: R > 1 is repeated augmentation, see ``epoch_order``.
        drop_last: leave out the last, smaller batch of an epoch.
        accumulate: micro-batches of one optimizer step on each process.
        pin_memory: default: whether CUDA is there.
        limit_train, limit_val: use this many samples only, always the same ones; default all.

    Raises:
        NotCacheable: from ``setup``, for a transform that a cached data set can't have; when the loaders are built, for
            images of several sizes or more than fit.
        ValueError: for sizes out of range; when the loaders are built, for a batch size that does not split evenly.
    """

    def __init__(
        self,
        dataset: ImageSource,
        train_transform: Transform,
        eval_transform: Transform,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        repetitions: int = 1,
        drop_last: bool = False,
        accumulate: int = 1,
        pin_memory: bool | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("repetitions", repetitions, 1),
            ("accumulate", accumulate, 1),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.dataset = dataset
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.repetitions = repetitions
        self.drop_last = drop_last
        self.accumulate = accumulate
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.limit_train = limit_train
        self.limit_val = limit_val
        # A source from elsewhere needn't have the attribute.
        self._is_cached = getattr(dataset, "cache", None) == "device"
        self._train_cache: DeviceCache | None = None
        self._val_cache: DeviceCache | None = None
        self._val_loader: DataLoader[Any] | None = None
        self._train: ImageDataset | None = None
        self._val: ImageDataset | None = None
        self._train_sampler: TrainBatchSampler | None = None
        self._sought: tuple[int, int] | None = None

    @property
    def class_names(self) -> list[str]:
        return self.dataset.class_names

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    @property
    def num_train(self) -> int:
        """Training samples, after ``limit_train``."""
        return len(self._train_part())  # type: ignore[arg-type]

    @property
    def num_val(self) -> int:
        """Validation samples, after ``limit_val``."""
        return len(self._val_part())  # type: ignore[arg-type]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, on any number of processes."""
        length = epoch_length(self.num_train, self.repetitions)
        return length // self.batch_size if self.drop_last else -(-length // self.batch_size)

    def prepare_data(self) -> None:
        self.dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit"):
            self._train_part()
            if self._is_cached:
                DeviceTransform(self.train_transform)
        self._val_part()

    def seek(self, epoch: int, step: int) -> None:
        """Let the coming training ``epoch`` begin at optimizer step ``step`` within it; later epochs begin at 0."""
        self._sought = (epoch, step)
        if self._train_sampler is not None:
            self._train_sampler.seek(epoch, step)

    def train_dataloader(self) -> Loader:
        world_size, rank = self._place()
        sampler = TrainBatchSampler(
            n=self.num_train,
            global_batch_size=self.batch_size,
            world_size=world_size,
            rank=rank,
            accumulate=self.accumulate,
            seed=self.seed,
            repetitions=self.repetitions,
            drop_last=self.drop_last,
        )
        if self._sought is not None:
            sampler.seek(*self._sought)
        self._train_sampler = sampler
        if self._is_cached:
            transform = DeviceTransform(self.train_transform)
            if self._train_cache is None:
                samples = SeededDataset(self._train_part(), transform.fixed)
                self._train_cache = self._cache(samples, "train", transform.border)
            return DeviceLoader(self._train_cache, sampler, transform)
        return self._loader(SeededDataset(self._train_part(), self.train_transform), "train", batch_sampler=sampler)

    def val_dataloader(self) -> Loader:
        world_size, rank = self._place()
        if self.num_val < world_size:
            raise ValueError(
                f"{self.num_val} validation sample(s) for {world_size} processes: every process needs at least one"
            )
        sampler = EvalBatchSampler(self.num_val, max(1, self.batch_size // world_size), world_size, rank)
        samples = SeededDataset(self._val_part(), self.eval_transform)
        if self._is_cached:
            if self._val_cache is None:
                self._val_cache = self._cache(samples, "eval")
            return DeviceLoader(self._val_cache, sampler)
        self._val_loader = self._loader(samples, "eval", batch_sampler=sampler)
        return self._val_loader

    def fixed_val_indices(self, n: int) -> list[int]:
        """At most ``n`` indices of validation samples, the same in every run."""
        return permutation(self.num_val, 0, Stream.SUBSET, 1)[:n].tolist()

    def fixed_val_samples(self, n: int) -> tuple[Tensor, Tensor]:
        """The samples of :meth:`fixed_val_indices`: uint8 (n,3,H,W) and labels (n,)."""
        return self.val_samples(self.fixed_val_indices(n))

    def train_samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Training samples by their indices, augmented alike at each call: uint8 (n,3,H,W) and labels (n,)."""
        part = SeededDataset(self._train_part(), self.train_transform)
        batch = Collate("augmentation.train")(part.__getitems__([(index, index) for index in indices]))
        return batch.images, batch.labels

    def val_samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Validation samples by their indices: uint8 (n,3,H,W) and labels (n,).

        Not while the validation loader is being iterated: once it is built, its worker processes do the work. The
        samples of a cached data set are on its device.
        """
        if self._val_cache is not None:
            index = torch.tensor(indices, device=self._val_cache.labels.device)
            return self._val_cache.images[index].permute(0, 3, 1, 2).contiguous(), self._val_cache.labels[index]
        collate = Collate("augmentation.eval")
        if self._val_loader is not None and self.num_workers and len(indices) >= _MANY:
            sampler = self._val_loader.batch_sampler
            assert isinstance(sampler, EvalBatchSampler)
            share = -(-len(indices) // self.num_workers)
            pieces = [list(indices[i : i + share]) for i in range(0, len(indices), share)]
            with sampler.requested(pieces):
                samples = [sample for piece in self._val_loader for sample in zip(*piece[:3], strict=True)]
        else:
            samples = SeededDataset(self._val_part(), self.eval_transform).__getitems__(list(indices))
        batch = collate(samples)
        return batch.images, batch.labels

    def _train_part(self) -> ImageDataset:
        if self._train is None:
            self._train = _limited(self.dataset.train(), self.limit_train)
        return self._train

    def _val_part(self) -> ImageDataset:
        if self._val is None:
            self._val = _limited(self.dataset.val(), self.limit_val)
        return self._val

    def _place(self) -> tuple[int, int]:
        """(number of processes, rank of this one)"""
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _cache(self, samples: SeededDataset, part: str, border: int = 0) -> DeviceCache:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        # Once through, sample by sample: the batches are pieces of work for the loading processes.
        every_sample = EvalBatchSampler(len(samples), 64)
        loader = self._loader(samples, part, batch_sampler=every_sample, persistent_workers=False)
        return DeviceCache.fill(
            loader, device, f"{self.dataset.name} ({'training' if part == 'train' else 'validation'})", border
        )

    def _loader(
        self, dataset: SeededDataset, part: str, batch_sampler: Sampler[Any], persistent_workers: bool = True
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=Collate(f"augmentation.{part}"),
            pin_memory=self.pin_memory,
            persistent_workers=persistent_workers and self.num_workers > 0,
            prefetch_factor=_prefetch_factor(self.num_workers),
            worker_init_fn=_init_worker,
            # The loader draws a number for its workers at every start: not from the generator that training uses.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _prefetch_factor(num_workers: int) -> int | None:
    """Batches that each worker loads ahead: four, with many workers two."""
    # Two a worker, torch's default, run dry when a few workers meet large images at once. Batches wait in shared
    # memory: 32 of 256 images of 224 px are 1.2 GB, and a machine with 64 cores and four a worker would hold 10 GB.
    return max(2, min(4, 32 // num_workers)) if num_workers else None


def _limited(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    """The first ``limit`` samples of a permutation that is the same in every run."""
    n = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= n:
        return dataset
    return Subset(dataset, permutation(n, 0, Stream.SUBSET)[:limit].tolist())


def _init_worker(worker_id: int) -> None:
    """Leave it to the main process to react to Ctrl-C and to the signals that Slurm sends to all processes of a job.

    A SIGTERM counts only if the main process sent it; otherwise the loader would fail before the main process could
    finish its batch and write a checkpoint. (A worker ends by itself once its main process is gone.)
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _obey(parent: int) -> None:
    """End this process on a SIGTERM from ``parent``."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
