"""A whole data set on the training device, and batches by index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.device_transform import DeviceTransform, NotCacheable
from bcos_train.dataset.sampler import EvalBatchSampler, SampleKey, TrainBatchSampler
from bcos_train.dataset.seeded import UnevenImages

__all__ = ["DeviceCache", "DeviceLoader"]

#: Batches whose random numbers are drawn and sent to the device together: a few milliseconds' work for 64 steps.
_BATCHES_AT_ONCE = 64


@dataclass(frozen=True)
class DeviceCache:
    """All images of a data set.

    Attributes:
        images: uint8 (M,H,W,3), with ``border`` black pixels on each side.
        labels: int64 (M,).
        border: Pixels.
    """

    images: Tensor
    labels: Tensor
    border: int = 0

    @classmethod
    def fill(cls, loader: DataLoader[Any], device: torch.device, what: str, border: int = 0) -> DeviceCache:
        """Cache what a loader yields.

        Args:
            loader: yields images uint8 (N,3,H,W), labels (N,) and indices (N,); every index in 0 … M-1 once.
            what: of the data set, for the errors.
            border: see above.

        Raises:
            NotCacheable: if images differ in size or the free memory is too small.
        """
        dataset: Any = loader.dataset
        total = len(dataset)
        images: Tensor | None = None
        labels = torch.empty(total, dtype=torch.int64)
        try:
            for batch in loader:
                height, width = batch.images.shape[2:]
                if images is None:
                    shape = (total, height + 2 * border, width + 2 * border, 3)
                    _check_memory(shape, device, what)
                    images = torch.zeros(shape, dtype=torch.uint8, device=device)
                    inner = images[:, border : border + height, border : border + width]
                if batch.images.shape[2:] != inner.shape[1:3]:
                    first_height, first_width = inner.shape[1:3]
                    raise NotCacheable(_uneven(what, f"{first_height}×{first_width} and {height}×{width}"))
                inner[batch.indices.to(device)] = batch.images.to(device).permute(0, 2, 3, 1)
                labels[batch.indices] = batch.labels
        except UnevenImages as error:
            raise NotCacheable(_uneven(what, "several")) from error
        assert images is not None, "a data set without images"
        return cls(images, labels.to(device), border)


def _uneven(what: str, sizes: str) -> str:
    return f"cache=device needs images of one size, {what} has {sizes}: leave the key out"


def _check_memory(shape: tuple[int, ...], device: torch.device, what: str) -> None:
    needed, free = np.prod(shape, dtype=np.int64).item(), _free_memory(device)
    if free is not None and needed > free:
        raise NotCacheable(
            f"cache=device: {what} needs {needed / 2**30:.1f} GiB, {max(free, 0) / 2**30:.1f} GiB are free on "
            f"{device}: leave the key out"
        )


def _free_memory(device: torch.device) -> int | None:
    """In bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        # What can be had without swapping; sysconf would count the page cache as taken.
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    return None


class DeviceLoader:
    """Batches of images uint8 (N,3,H,W), labels int64 (N,), indices int64 (N,), on the cache's device.

    Stands for a ``DataLoader`` with the same ``batch_sampler`` and yields the same batches, bit for bit, but in the
    channels_last memory format. It has no worker processes and never waits for the device.

    Args:
        cache: the images; its border is ``transform``'s.
        batch_sampler: yields lists of keys: (index, seed) with a transform, indices without.
        transform: what happens to each sample; None for nothing.
    """

    def __init__(
        self,
        cache: DeviceCache,
        batch_sampler: TrainBatchSampler | EvalBatchSampler,
        transform: DeviceTransform | None = None,
    ) -> None:
        self.cache = cache
        #: Lightning sets the epoch of ``batch_sampler.sampler``.
        self.batch_sampler = batch_sampler
        self.transform = transform
        height, width = (side - 2 * cache.border for side in cache.images.shape[1:3])
        self._image_size = height, width
        self._size = (height, width) if transform is None else transform.size(height, width)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches: Iterator[list[Any]] = iter(self.batch_sampler)
        while several := list(islice(batches, _BATCHES_AT_ONCE)):
            table = self._table([key for batch in several for key in batch])
            for part in table.split([len(batch) for batch in several]):
                index = part[:, 0]
                yield Batch(self._images(index, part[:, 1:]), self.cache.labels[index], index)

    def _table(self, keys: Sequence[int | SampleKey]) -> Tensor:
        """Indices, and windows with a transform, on the device: int64 (N, 1 or 4)."""
        table = np.array(keys, dtype=np.int64).reshape(-1, 1 if self.transform is None else 2)
        if self.transform is not None:
            table = np.hstack([table[:, :1], self.transform.windows(table[:, 1], *self._image_size)])
        tensor = torch.from_numpy(table)
        if self.cache.images.device.type == "cuda":
            # A copy from pageable memory would wait for all that the device has yet to do.
            tensor = tensor.pin_memory()
        return tensor.to(self.cache.images.device, non_blocking=True)

    def _images(self, index: Tensor, windows: Tensor) -> Tensor:
        if self.transform is None:
            return self.cache.images[index].permute(0, 3, 1, 2)
        return self.transform.cut(self.cache.images, index, windows, self._size)
