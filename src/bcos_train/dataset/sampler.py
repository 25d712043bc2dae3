"""Batch samplers for exact resume in training and exact counts in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch.utils.data import Sampler

from bcos_train.dataset.randomness import epoch_length, epoch_order, sample_seeds

__all__ = ["EvalBatchSampler", "SampleKey", "TrainBatchSampler"]

SampleKey = tuple[int, int]
"""(index of the sample, seed of its augmentation)."""


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one process, as lists of ``(index, augmentation seed)``.

    The order of the epoch is divided into global batches; process r takes the samples r, r + world_size, … of each and
    splits them into ``accumulate`` equal micro-batches. So the samples of an optimizer step depend neither on the
    number of processes nor on accumulation. A smaller last global batch is padded from the start of the order to a
    multiple of ``world_size * accumulate`` (with different augmentations), so that the mean over processes and
    micro-batches equals the mean over samples.

    After ``seek(epoch, step)`` that epoch begins at that optimizer step; every other epoch begins at 0. Lightning calls
    ``set_epoch`` before each epoch.

    Args:
        n: Number of samples in the data set.
        global_batch_size: Samples per optimizer step, over all processes and micro-batches.
        world_size, rank: Number of processes, and index of this one.
        accumulate: Micro-batches per optimizer step on each process.
        seed: Seeds orders and augmentation.
        repetitions: More than 1: repeated augmentation, see :func:`~bcos_train.dataset.randomness.epoch_order`.
        drop_last: Drop a smaller last global batch instead of padding it.

    Raises:
        ValueError: Sizes don't divide evenly, or there would be no batch.
    """

    def __init__(
        self,
        n: int,
        global_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        seed: int = 0,
        repetitions: int = 1,
        drop_last: bool = False,
    ) -> None:
        for name, value in (
            ("n", n),
            ("batch_size", global_batch_size),
            ("world_size", world_size),
            ("accumulate", accumulate),
            ("repetitions", repetitions),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        _check_rank(rank, world_size)
        self._parts = world_size * accumulate
        if global_batch_size % self._parts:
            below = global_batch_size // self._parts * self._parts
            near = " or ".join(str(b) for b in (below, below + self._parts) if b)
            raise ValueError(
                f"batch_size={global_batch_size} does not split evenly over {world_size} process(es) × {accumulate} "
                f"accumulated micro-batch(es): it must be a multiple of {self._parts}, for instance {near}"
            )
        self._length = epoch_length(n, repetitions)
        if drop_last and self._length < global_batch_size:
            raise ValueError(
                f"drop_last=true leaves no batch: an epoch has {self._length} samples, batch_size is "
                f"{global_batch_size}; use a smaller batch_size or drop_last=false"
            )
        self.n = n
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.rank = rank
        self.accumulate = accumulate
        self.seed = seed
        self.repetitions = repetitions
        self.drop_last = drop_last
        self.epoch = 0
        #: Epoch and optimizer step in it at which training resumes.
        self._resume_at = (0, 0)

    @property
    def sampler(self) -> TrainBatchSampler:
        """This sampler: Lightning calls ``dataloader.batch_sampler.sampler.set_epoch``."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch, regardless of ``start_step``."""
        full, rest = divmod(self._length, self.global_batch_size)
        return full if self.drop_last or not rest else full + 1

    @property
    def start_step(self) -> int:
        """Optimizer step within ``epoch`` at which iteration begins: 0, except in the epoch passed to :meth:`seek`."""
        epoch, step = self._resume_at
        return step if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def seek(self, epoch: int, step: int) -> None:
        """Begin ``epoch`` at optimizer step ``step`` (0 … steps_per_epoch).

        Raises:
            ValueError: There is no such epoch or step.
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"cannot resume at epoch {epoch}, step {step}: an epoch has {self.steps_per_epoch} optimizer steps"
            )
        self.epoch = epoch
        self._resume_at = (epoch, step)

    def __len__(self) -> int:
        """Return the number of micro-batches in a whole epoch on this process, regardless of ``start_step``."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch
        order = epoch_order(self.seed, epoch, self.n, self.repetitions).numpy()
        for step in range(self.start_step, self.steps_per_epoch):
            indices, seeds = self._local_samples(order, epoch, step)
            size = len(indices) // self.accumulate
            for begin in range(0, len(indices), size):
                micro_batch = slice(begin, begin + size)
                yield list(zip(indices[micro_batch].tolist(), seeds[micro_batch].tolist(), strict=True))

    def _local_samples(self, order: np.ndarray, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this process's indices and augmentation seeds in global batch ``step``: both (B / world_size,)."""
        begin = step * self.global_batch_size
        end = min(begin + self.global_batch_size, self._length)
        padded_end = begin + -(-(end - begin) // self._parts) * self._parts
        # Past the end the order is repeated, and its samples count as further repetitions.
        cycle, position = np.divmod(np.arange(begin + self.rank, padded_end, self.world_size), self._length)
        indices = order[position]
        return indices, sample_seeds(self.seed, epoch, indices, cycle * self.repetitions + position % self.repetitions)


class EvalBatchSampler(Sampler[list[int | SampleKey]]):
    """Every sample exactly once over all processes: process r takes r, r + world_size, …, without padding.

    The processes' numbers of batches can differ by one.

    Args:
        n: Number of samples in the data set.
        batch_size: Samples per batch and process.
        world_size, rank: Number of processes, and index of this one.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(self, n: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        if n < 0 or batch_size < 1 or world_size < 1:
            raise ValueError(
                f"n must be at least 0, batch_size and world_size at least 1; "
                f"got n={n}, batch_size={batch_size}, world_size={world_size}"
            )
        _check_rank(rank, world_size)
        self.batch_size = batch_size
        self._indices = range(rank, n, world_size)
        self._batches: Sequence[list[int | SampleKey]] | None = None

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int | SampleKey]]:
        if self._batches is not None:
            yield from self._batches
            return
        for begin in range(0, len(self._indices), self.batch_size):
            yield list(self._indices[begin : begin + self.batch_size])

    @contextmanager
    def use_batches(self, batches: Sequence[list[int | SampleKey]]) -> Iterator[None]:
        """Yield ``batches`` instead within the block, to load arbitrary samples with a loader's worker processes."""
        self._batches = batches
        try:
            yield
        finally:
            self._batches = None


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 … {world_size - 1} for world_size={world_size}, not {rank}")
