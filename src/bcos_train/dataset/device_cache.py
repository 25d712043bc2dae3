"""Keep a whole data set on the training device and load batches from there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.device_transform import DeviceTransform, NotCacheable
from bcos_train.dataset.sampler import EvalBatchSampler, SampleKey, TrainBatchSampler
from bcos_train.dataset.seeded import ImageSizeMismatch, Sample

__all__ = ["DeviceCache", "DeviceLoader"]

#: Batches whose random numbers are drawn and sent to the device together: a few milliseconds for 64 steps.
_BATCHES_AT_ONCE = 64


@dataclass(frozen=True)
class DeviceCache:
    """All images of a data set, on a device.

    Attributes:
        images: ``(M, H, W, 3)``, uint8, with a black border.
        labels: ``(M,)``, int64.
        border: Width of the border on each side, in pixels.
    """

    images: Tensor
    labels: Tensor
    border: int = 0

    @classmethod
    def fill(cls, loader: DataLoader[Sample], n: int, device: torch.device, name: str, border: int = 0) -> DeviceCache:
        """Cache all samples of a loader.

        Args:
            loader: Yields :class:`~bcos_train.dataset.batch.Batch`, with every index in 0 … n-1 once.
            n: Number of samples.
            name: Name of the data set, for error messages.
            border: Width of the black border on each side, in pixels.

        Raises:
            NotCacheable: The images differ in size or don't fit into the free memory.
        """
        images: Tensor | None = None
        labels = torch.empty(n, dtype=torch.int64)
        batch: Batch
        try:
            for batch in loader:
                height, width = batch.images.shape[2:]
                if images is None:
                    shape = (n, height + 2 * border, width + 2 * border, 3)
                    _check_memory(shape, device, name)
                    images = torch.zeros(shape, dtype=torch.uint8, device=device)
                    inner = images[:, border : border + height, border : border + width]
                if batch.images.shape[2:] != inner.shape[1:3]:
                    first_height, first_width = inner.shape[1:3]
                    raise NotCacheable(_size_mismatch(name, f"{first_height}×{first_width} and {height}×{width}"))
                inner[batch.indices.to(device)] = batch.images.to(device).permute(0, 2, 3, 1)
                labels[batch.indices] = batch.labels
        except ImageSizeMismatch as error:
            raise NotCacheable(_size_mismatch(name, "several")) from error
        assert images is not None, "the data set is empty"
        return cls(images, labels.to(device), border)


def _size_mismatch(name: str, sizes: str) -> str:
    return f"cache=device needs images of one size, {name} has {sizes}: omit the key"


def _check_memory(shape: tuple[int, ...], device: torch.device, name: str) -> None:
    needed, free = np.prod(shape, dtype=np.int64).item(), _free_memory(device)
    if free is not None and needed > free:
        raise NotCacheable(
            f"cache=device: {name} needs {needed / 2**30:.1f} GiB, {max(free, 0) / 2**30:.1f} GiB are free on "
            f"{device}: omit the key"
        )


def _free_memory(device: torch.device) -> int | None:
    """Return the free memory in bytes, or None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        # Available without swapping; sysconf would count the page cache as used.
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    return None


class DeviceLoader:
    """Loads batches from a :class:`DeviceCache`, on its device.

    Replaces a ``DataLoader`` with the same ``batch_sampler``: the batches are bit-identical, but in the channels_last
    memory format. It has no worker processes and never waits for the device.

    Args:
        cache: The images, with the border of ``transform``.
        batch_sampler: Yields lists of keys: ``(index, seed)`` with a transform, indices without.
        transform: Transform of the samples, or None.
    """

    def __init__(
        self,
        cache: DeviceCache,
        batch_sampler: TrainBatchSampler | EvalBatchSampler,
        transform: DeviceTransform | None = None,
    ) -> None:
        self.cache = cache
        # Lightning calls `batch_sampler.sampler.set_epoch`.
        self.batch_sampler = batch_sampler
        self.transform = transform
        height, width = (side - 2 * cache.border for side in cache.images.shape[1:3])
        self._image_size = height, width
        self._size = (height, width) if transform is None else transform.size(height, width)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        sampler: Iterator[Sequence[int | SampleKey]] = iter(self.batch_sampler)
        while batches := list(islice(sampler, _BATCHES_AT_ONCE)):
            table = self._table([key for batch in batches for key in batch])
            for part in table.split([len(batch) for batch in batches]):
                index = part[:, 0]
                yield Batch(self._images(index, part[:, 1:]), self.cache.labels[index], index)

    def _table(self, keys: Sequence[int | SampleKey]) -> Tensor:
        """Return indices and, with a transform, windows on the device: int64 (N, 1 or 4)."""
        table = np.array(keys, dtype=np.int64).reshape(-1, 1 if self.transform is None else 2)
        if self.transform is not None:
            table = np.hstack([table[:, :1], self.transform.windows(table[:, 1], *self._image_size)])
        tensor = torch.from_numpy(table)
        if self.cache.images.device.type == "cuda":
            # A copy from pageable memory would wait until the device has completed all queued work.
            tensor = tensor.pin_memory()
        return tensor.to(self.cache.images.device, non_blocking=True)

    def _images(self, index: Tensor, windows: Tensor) -> Tensor:
        if self.transform is None:
            return self.cache.images[index].permute(0, 3, 1, 2)
        return self.transform.crop(self.cache.images, index, windows, self._size)
