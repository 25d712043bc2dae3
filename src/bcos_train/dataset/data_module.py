"""The Lightning data module: exact, resumable loaders of uint8 batches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bcos_train.dataset.base import ImageDataset, ImageSource
from bcos_train.dataset.batch import Batch
from bcos_train.dataset.boxes import check_carries_boxes
from bcos_train.dataset.device_cache import DeviceCache, DeviceLoader
from bcos_train.dataset.device_transform import DeviceTransform
from bcos_train.dataset.inventory import Inventory, take_inventory
from bcos_train.dataset.randomness import Stream, epoch_length, permutation
from bcos_train.dataset.sampler import EvalBatchSampler, SampleKey, TrainBatchSampler
from bcos_train.dataset.seeded import (
    Lookup,
    Sample,
    SeededDataset,
    Transform,
    join_batches,
    loader_collation,
    read_batch,
)
from bcos_train.dataset.unreadable import SkippingLoader, UnreadableSamples, accepted

__all__ = ["DataModule"]

#: Smallest number of samples to load with worker processes, which may have to be started first.
_MIN_SAMPLES_FOR_WORKERS = 16

Loader = DataLoader[Sample] | DeviceLoader | SkippingLoader
"""Yields :class:`~bcos_train.dataset.batch.Batch`."""


class DataModule(pl.LightningDataModule):
    """Batches for training and validation, see :class:`~bcos_train.dataset.batch.Batch`.

    Build the trainer with ``use_distributed_sampler=False``: the samplers distribute the samples themselves.

    Args:
        dataset: The images; with ``dataset.cache == "device"`` they are kept on the trainer's device.
        train_transform: PIL image -> uint8 ``(3, H, W)``, may be random.
        eval_transform: PIL image -> uint8 ``(3, H, W)``, deterministic.
        batch_size: Samples per optimizer step, over all processes and accumulated micro-batches.
        num_workers: Worker processes of each process; results do not depend on it.
        seed: Seeds data order and augmentation.
        repetitions: More than 1: repeated augmentation, see :func:`~bcos_train.dataset.randomness.epoch_order`.
        drop_last: Drop the last, smaller batch of an epoch.
        accumulate: Micro-batches per optimizer step on each process.
        pin_memory: Load batches into pinned memory; ``None``: if CUDA is available.
        limit_train, limit_val: Use only this many samples, always the same ones; ``None``: all.

    Raises:
        NotCacheable: From ``setup``: a transform is incompatible with the cache. When a loader is built: the images
            differ in size or don't fit into memory.
        ValueError: A size is out of range or ``dataset.cache`` unknown or impossible. From ``setup``: a transform
            doesn't carry the boxes of the data set. When a loader is built: the batch size can't be split evenly.
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
        for name, value, minimum in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("repetitions", repetitions, 1),
            ("accumulate", accumulate, 1),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 1),
        ):
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}")
        cache = getattr(dataset, "cache", None)  # optional, see ImageSource
        if cache not in ("device", None):
            raise ValueError(f"cache must be 'device' or None, not {cache!r}")
        self.dataset = dataset
        if cache is not None and (self.has_boxes or self.is_multi_label or self.group_names is not None):
            raise ValueError(
                f"cache={cache}: {dataset.name} has boxes, groups or several labels per image: omit the key"
            )
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
        #: Further extras of the training samples, see :class:`~bcos_train.dataset.seeded.SeededDataset`.
        self.train_lookup: Lookup | None = None
        #: Share of samples that may be unreadable; 0: they raise an error.
        self.max_skipped: float = 0.0 if cache is not None else getattr(dataset, "max_skipped", 0.0)
        self._unreadable: dict[str, UnreadableSamples] = {}
        self._is_cached = cache == "device"
        self._train_cache: DeviceCache | None = None
        self._val_cache: DeviceCache | None = None
        self._val_loader: DataLoader[Sample] | SkippingLoader | None = None
        self._train: ImageDataset | None = None
        self._val: ImageDataset | None = None
        self._train_sampler: TrainBatchSampler | None = None
        self._resume_at: tuple[int, int] | None = None

    @property
    def class_names(self) -> list[str]:
        return self.dataset.class_names

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    @property
    def is_multi_label(self) -> bool:
        """True if an image can have several classes: labels are multi-hot."""
        return bool(getattr(self.dataset, "is_multi_label", False))

    @property
    def has_boxes(self) -> bool:
        """True if the images have boxes, ``Batch.extras["boxes"]``."""
        return bool(getattr(self.dataset, "has_boxes", False))

    @property
    def group_names(self) -> list[str] | None:
        """Names of the groups of the data set, the values of ``Batch.extras["groups"]``, or None."""
        return getattr(self.dataset, "group_names", None)

    @property
    def num_train(self) -> int:
        """Number of training samples, at most ``limit_train``."""
        return len(self._train_dataset())  # type: ignore[arg-type]

    @property
    def num_val(self) -> int:
        """Number of validation samples, at most ``limit_val``."""
        return len(self._val_dataset())  # type: ignore[arg-type]

    @cached_property
    def inventory(self) -> Inventory:
        """Numbers and hashes of all images, see :func:`~bcos_train.dataset.inventory.take_inventory`."""
        return take_inventory(self._train_dataset(), self._val_dataset())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, independent of the number of processes."""
        length = epoch_length(self.num_train, self.repetitions)
        return length // self.batch_size if self.drop_last else -(-length // self.batch_size)

    def smallest_batch(self, world_size: int) -> int:
        """Number of images in the smallest micro-batch of an epoch on a device."""
        rest = epoch_length(self.num_train, self.repetitions) % self.batch_size
        size = self.batch_size if self.drop_last or not rest else rest
        return -(-size // (world_size * self.accumulate))

    def check_num_val(self, world_size: int) -> None:
        """Raise a ValueError if there are fewer validation samples than processes."""
        if self.num_val < world_size:
            raise ValueError(
                f"{self.num_val} validation sample(s) for {world_size} processes: every process needs at least one"
            )

    def prepare_data(self) -> None:
        self.dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self.has_boxes:
            check_carries_boxes(self.eval_transform, "augmentation.eval")
            if stage in (None, "fit"):
                check_carries_boxes(self.train_transform, "augmentation.train")
        if stage in (None, "fit"):
            self._train_dataset()
            if self._is_cached:
                DeviceTransform(self.train_transform)  # raises NotCacheable before images are loaded
        self._val_dataset()

    def seek(self, epoch: int, step: int) -> None:
        """Begin training epoch ``epoch`` at optimizer step ``step``; later epochs begin at 0."""
        self._resume_at = (epoch, step)
        if self._train_sampler is not None:
            self._train_sampler.seek(epoch, step)

    def train_dataloader(self) -> Loader:
        world_size, rank = self._world_size_and_rank()
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
        if self._resume_at is not None:
            sampler.seek(*self._resume_at)
        self._train_sampler = sampler
        if self._is_cached:
            transform = DeviceTransform(self.train_transform)
            if self._train_cache is None:
                samples = SeededDataset(self._train_dataset(), transform.deterministic)
                self._train_cache = self._cache(samples, "train", transform.border)
            return DeviceLoader(self._train_cache, sampler, transform)
        return self._skipping_loader(self._train_samples(self.train_lookup), "train", sampler)

    def val_dataloader(self) -> Loader:
        world_size, rank = self._world_size_and_rank()
        self.check_num_val(world_size)
        sampler = EvalBatchSampler(self.num_val, max(1, self.batch_size // world_size), world_size, rank)
        samples = self._val_samples()
        if self._is_cached:
            if self._val_cache is None:
                self._val_cache = self._cache(samples, "eval")
            return DeviceLoader(self._val_cache, sampler)
        self._val_loader = self._skipping_loader(samples, "eval", sampler)
        return self._val_loader

    def count_skipped(self, part: Literal["train", "eval"]) -> int:
        """Return how often this process has left out unreadable samples in the latest training epoch or validation."""
        return self._unreadable[part].count if part in self._unreadable else 0

    def fixed_val_indices(self, n: int) -> list[int]:
        """Return the indices of at most ``n`` validation samples, the same in every run."""
        return permutation(self.num_val, 0, Stream.SUBSET, 1)[:n].tolist()

    def fixed_val_samples(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the samples of :meth:`fixed_val_indices`: uint8 ``(n, 3, H, W)`` and their labels."""
        return self.val_samples(self.fixed_val_indices(n))

    def train_samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return training samples, augmented by the seed ``index``: uint8 ``(n, 3, H, W)`` and their labels."""
        batch = read_batch(self._train_samples(), [(index, index) for index in indices], "augmentation.train")
        return batch.images, batch.labels

    def val_samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return validation samples: uint8 ``(n, 3, H, W)`` and their labels; see :meth:`val_batch`."""
        batch = self.val_batch(indices)
        return batch.images, batch.labels

    def val_batch(self, indices: Sequence[int]) -> Batch:
        """Return validation samples as a batch, with boxes and groups if the data set has them.

        Do not call this while iterating the validation loader, whose worker processes are used once it is built. The
        samples of a cached data set are on its device.
        """
        if self._val_cache is not None:
            index = torch.tensor(indices, device=self._val_cache.labels.device)
            images = self._val_cache.images[index].permute(0, 3, 1, 2).contiguous()
            return Batch(images, self._val_cache.labels[index], index)
        # With a seed, which a deterministic transform ignores, others take the place of unreadable samples.
        keys: list[int | SampleKey] = [(index, index) for index in indices] if self.max_skipped else list(indices)
        if self._val_loader is not None and self.num_workers and len(indices) >= _MIN_SAMPLES_FOR_WORKERS:
            loader = self._val_loader
            sampler = loader.batch_sampler
            assert isinstance(sampler, EvalBatchSampler)
            share = -(-len(indices) // self.num_workers)
            with sampler.use_batches([keys[i : i + share] for i in range(0, len(keys), share)]):
                batches = [batch for batch, _ in loader.loader] if isinstance(loader, SkippingLoader) else list(loader)
                return join_batches(batches, "augmentation.eval")
        return read_batch(self._val_samples(), keys, "augmentation.eval")

    def images(self, part: Literal["train", "val"]) -> ImageDataset:
        """Return the images of a part as they are used, without a transform."""
        return self._train_dataset() if part == "train" else self._val_dataset()

    def view_loader(
        self, part: Literal["train", "val"], transform: Transform, batches: Sequence[list[int]]
    ) -> DataLoader[Sample]:
        """Return a loader of these batches of indices, with a deterministic transform."""
        return self._loader(SeededDataset(self.images(part), transform), "eval", batches, persistent_workers=False)

    def _train_samples(self, lookup: Lookup | None = None) -> SeededDataset:
        return SeededDataset(self._train_dataset(), self.train_transform, lookup, skips=self.max_skipped > 0)

    def _val_samples(self) -> SeededDataset:
        return SeededDataset(self._val_dataset(), self.eval_transform, skips=self.max_skipped > 0)

    def _train_dataset(self) -> ImageDataset:
        if self._train is None:
            self._train = _fixed_subset(self.dataset.train(), self.limit_train)
        return self._train

    def _val_dataset(self) -> ImageDataset:
        if self._val is None:
            self._val = _fixed_subset(self.dataset.val(), self.limit_val)
        return self._val

    def _world_size_and_rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _cache(self, samples: SeededDataset, part: str, border: int = 0) -> DeviceCache:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        # The batch size only determines how the samples are distributed over the worker processes.
        loader = self._loader(samples, part, EvalBatchSampler(len(samples), 64), persistent_workers=False)
        name = f"{self.dataset.name} ({'training' if part == 'train' else 'validation'})"
        return DeviceCache.fill(loader, len(samples), device, name, border)

    def _skipping_loader(
        self, samples: SeededDataset, part: str, batch_sampler: TrainBatchSampler | EvalBatchSampler
    ) -> DataLoader[Sample] | SkippingLoader:
        """Return a loader that leaves out unreadable samples, if they are accepted."""
        loader = self._loader(samples, part, batch_sampler)
        if not samples.skips:
            return loader
        limit, name = accepted(len(samples), self.max_skipped), "training" if part == "train" else "validation"
        unreadable = self._unreadable.setdefault(
            part, UnreadableSamples(limit, f"{name} images of {self.dataset.name}")
        )
        return SkippingLoader(loader, unreadable)

    def _loader(
        self,
        dataset: SeededDataset,
        part: str,
        batch_sampler: TrainBatchSampler | EvalBatchSampler | Sequence[list[int]],
        persistent_workers: bool = True,
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=loader_collation(dataset, f"augmentation.{part}"),
            pin_memory=self.pin_memory,
            persistent_workers=persistent_workers and self.num_workers > 0,
            prefetch_factor=_prefetch_factor(self.num_workers),
            worker_init_fn=_init_worker,
            # The loader draws a seed for its workers whenever it is iterated: not from the generator of the training.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _prefetch_factor(num_workers: int) -> int | None:
    """Return the number of batches that each worker prefetches: four, or two with many workers."""
    # Two, torch's default, are not enough when several workers decode large images at once. Prefetched batches are in
    # shared memory: 32 batches of 256 images of 224 px take 1.2 GB, four for each of 64 workers would take 10 GB.
    return max(2, min(4, 32 // num_workers)) if num_workers else None


def _fixed_subset(dataset: ImageDataset, limit: int | None) -> ImageDataset:
    """Return the first ``limit`` samples of a permutation that is the same in every run."""
    n = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= n:
        return dataset
    return Subset(dataset, permutation(n, 0, Stream.SUBSET)[:limit].tolist())


def _init_worker(worker_id: int) -> None:
    """Ignore the signals of a terminal or of Slurm, which reach all processes of a job: the main process handles them.

    SIGTERM is ignored unless the main process sent it; otherwise the loader would fail before the main process could
    finish its batch and write a checkpoint. (A worker exits by itself when its main process has ended.)
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _exit_on_sigterm(parent: int) -> None:
    """Exit this process on a SIGTERM from ``parent``."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
