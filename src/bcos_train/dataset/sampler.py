"""Batch samplers that know exactly which sample goes where: exact resume in training, exact counts in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch.utils.data import Sampler

from bcos_train.dataset.randomness import epoch_length, epoch_order, sample_seeds

__all__ = ["EvalBatchSampler", "SampleKey", "TrainBatchSampler"]

SampleKey = tuple[int, int]
"""(index of the sample, seed of its augmentation)"""


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one process, as lists of ``(index, augmentation seed)``.

    The epoch's order is cut into global batches of B; process r takes every world-th sample of one from the r-th on
    and splits its share into ``accumulate`` equal micro-batches. So the samples of an optimizer step depend neither on
    the number of processes nor on accumulation. A last, smaller global batch is topped up from the start of the order
    to a multiple of ``world_size * accumulate`` (with augmentations of its own), so that the mean over processes and
    micro-batches stays the mean over samples.

    ``seek(epoch, step)`` makes that epoch begin at that optimizer step; every other epoch begins at 0. Lightning calls
    ``set_epoch`` before each epoch.

    Args:
        n: samples in the data set.
        global_batch_size: samples of one optimizer step, over all processes and micro-batches.
        repetitions: R > 1 is repeated augmentation, see ``epoch_order``.
        drop_last: leave the last, smaller global batch out instead of topping it up.

    Raises:
        ValueError: for sizes that do not divide evenly, or a data set that gives no batch.
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
        self._sought = (0, 0)

    @property
    def sampler(self) -> TrainBatchSampler:
        """Itself: Lightning looks for ``set_epoch`` at ``dataloader.batch_sampler.sampler``."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch, whatever the start step."""
        full, rest = divmod(self._length, self.global_batch_size)
        return full if self.drop_last or not rest else full + 1

    @property
    def start_step(self) -> int:
        """The optimizer step within ``epoch`` that iteration begins at: 0, except in the epoch that was sought."""
        epoch, step = self._sought
        return step if epoch == self.epoch else 0

    @start_step.setter
    def start_step(self, step: int) -> None:
        self.seek(self.epoch, step)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def seek(self, epoch: int, step: int) -> None:
        """Let ``epoch`` begin at optimizer step ``step`` (0 … steps_per_epoch)."""
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"cannot go on at epoch {epoch}, step {step}: an epoch has {self.steps_per_epoch} optimizer steps"
            )
        self.epoch = epoch
        self._sought = (epoch, step)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this process, also when iteration begins later."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch
        order = epoch_order(self.seed, epoch, self.n, self.repetitions).numpy()
        for step in range(self.start_step, self.steps_per_epoch):
            indices, seeds = self._share(order, epoch, step)
            size = len(indices) // self.accumulate
            for part in range(self.accumulate):
                cut = slice(part * size, (part + 1) * size)
                yield list(zip(indices[cut].tolist(), seeds[cut].tolist(), strict=True))

    def _share(self, order: np.ndarray, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's indices and augmentation seeds in global batch ``step``: both (B / world,)."""
        begin = step * self.global_batch_size
        end = min(begin + self.global_batch_size, self._length)
        topped_up = begin + -(-(end - begin) // self._parts) * self._parts
        position = np.arange(begin + self.rank, topped_up, self.world_size)
        # Beyond the end the order begins again, and its samples count as further repetitions.
        lap, place = np.divmod(position, self._length)
        indices = order[place]
        return indices, sample_seeds(self.seed, epoch, indices, lap * self.repetitions + place % self.repetitions)


class EvalBatchSampler(Sampler[list[int]]):
    """Every sample exactly once over all processes: process r takes r, r + world, r + 2·world, …; nothing is padded.

    The numbers of batches of two processes can differ by one.

    Args:
        n: samples in the data set.
        batch_size: samples of one batch of one process.
    """

    def __init__(self, n: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        if n < 0 or batch_size < 1 or world_size < 1:
            raise ValueError(
                f"n must be at least 0, batch_size and world_size at least 1; "
                f"got n={n}, batch_size={batch_size}, world_size={world_size}"
            )
        _check_rank(rank, world_size)
        self.batch_size = batch_size
        self._mine = range(rank, n, world_size)
        self._requested: Sequence[list[int]] | None = None

    def __len__(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self._requested is not None:
            yield from self._requested
            return
        for begin in range(0, len(self._mine), self.batch_size):
            yield list(self._mine[begin : begin + self.batch_size])

    @contextmanager
    def requested(self, batches: Sequence[list[int]]) -> Iterator[None]:
        """Yield ``batches`` within the block, so that a loader's worker processes can be asked for any samples."""
        self._requested = batches
        try:
            yield
        finally:
            self._requested = None


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 … {world_size - 1} for world_size={world_size}, not {rank}")
