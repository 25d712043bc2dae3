"""Samples that can't be read: how many are accepted, and what is said about them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import DataLoader

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.sampler import EvalBatchSampler, TrainBatchSampler

if TYPE_CHECKING:
    from bcos_train.dataset.seeded import Sample

__all__ = ["SkippingLoader", "TooManyUnreadable", "Unreadable", "UnreadableSamples", "accepted"]

_logger = logging.getLogger(__name__)
#: Samples that the error message lists.
_LISTED = 10


class Unreadable(NamedTuple):
    """A sample that can't be read: its index in the data set, and what is wrong, with its path."""

    sample: int
    message: str


class TooManyUnreadable(ValueError):
    """More samples than ``dataset.max_skipped`` can't be read. The message lists the first of them."""


def accepted(n: int, max_skipped: float) -> int:
    """Return how many of ``n`` samples may be unreadable: at least one, unless ``max_skipped`` is 0."""
    return max(1, int(max_skipped * n)) if max_skipped else 0


class UnreadableSamples:
    """The unreadable samples of one part of a data set.

    Args:
        limit: Number that is accepted, in this process.
        part: Name of the part, for messages.

    Attributes:
        count: How often one of them was left out since a loader of the part was last iterated.
    """

    def __init__(self, limit: int, part: str) -> None:
        self.limit, self.part = limit, part
        self.count = 0
        self.messages: dict[int, str] = {}

    def add(self, samples: Iterable[Unreadable]) -> None:
        """Count samples, and name each of them in the log when it occurs for the first time.

        Raises:
            TooManyUnreadable: There are more than the limit.
        """
        for index, message in samples:
            self.count += 1
            if index in self.messages:
                continue
            self.messages[index] = message
            _logger.warning("%s: left out, %s", self.part, message)
            if len(self.messages) > self.limit:
                listed = "; ".join(list(self.messages.values())[:_LISTED])
                more = f"; and {len(self.messages) - _LISTED} more" if len(self.messages) > _LISTED else ""
                raise TooManyUnreadable(
                    f"more than {self.limit} of the {self.part} can't be read (dataset.max_skipped): {listed}{more}"
                )


class SkippingLoader:
    """Yields the batches of a loader whose collation separates readable from unreadable samples.

    Args:
        loader: Yields pairs of a :class:`~bcos_train.dataset.batch.Batch`, or None if no sample could be read, and the
            unreadable samples.
        unreadable: Receives the unreadable samples.
    """

    def __init__(self, loader: DataLoader[Sample], unreadable: UnreadableSamples) -> None:
        self.loader, self.unreadable = loader, unreadable

    @property
    def batch_sampler(self) -> TrainBatchSampler | EvalBatchSampler:
        """The loader's; Lightning calls ``batch_sampler.sampler.set_epoch``."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, (TrainBatchSampler, EvalBatchSampler))
        return sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.unreadable.count = 0
        for batch, unreadable in self.loader:
            self.unreadable.add(unreadable)
            if batch is not None:
                yield batch
