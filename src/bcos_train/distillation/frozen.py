"""A teacher whose predictions and explanations were computed once for each image ("frozen", arXiv 2402.03119).

Axes: N images, K classes, C channels, h, w pixels of a stored map, H, W pixels of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bcos_train.distillation.options import ExplanationKind
from bcos_train.distillation.store import Part, Store

__all__ = ["FrozenTeacher", "TrainLookup", "crop_maps"]

#: Steps per pixel of a map to which positions are rounded, so that a map of the images' size is reproduced exactly.
_STEPS = 4096


def crop_maps(maps: Tensor, windows: Tensor, height: int, width: int) -> Tensor:
    """Take the windows of maps that crops show of their images, by bilinear interpolation without antialiasing.

    Coordinates are relative to the whole image, so maps may have any resolution. Where a crop shows padding, there is
    no map: the result is 0. Flips move values, and change neither their signs nor the channels.

    Args:
        maps: (N, C, h, w) of whole images.
        windows: (N, 4): x0, y0, x1, y1 with x0 > x1 for flipped crops, see
            :func:`bcos_train.dataset.window.draw_window`.
        height, width: Size H, W of the crops.

    Returns:
        float32 (N, C, H, W).
    """
    maps = maps.float()
    x0, y0, x1, y1 = windows.float()[:, :, None].unbind(1)
    for dim, begin, end, size in ((2, y0, y1, height), (3, x0, x1, width)):
        # Relative positions of the centers of the crop's pixels, (N, size).
        relative = begin + (torch.arange(size, device=maps.device) + 0.5) / size * (end - begin)
        maps = _interpolate(maps, relative, dim)
    return maps


def _interpolate(maps: Tensor, relative: Tensor, dim: int) -> Tensor:
    """Interpolate maps (N, C, h, w) linearly along ``dim`` at relative positions (N, size)."""
    last = maps.shape[dim] - 1
    position = ((relative * (last + 1) - 0.5) * _STEPS).round() / _STEPS
    lower = position.floor()
    shape = [len(maps), 1, 1, 1]
    shape[dim] = relative.shape[1]

    def take(index: Tensor) -> Tensor:
        sizes = list(maps.shape)
        sizes[dim] = relative.shape[1]
        return maps.gather(dim, index.clamp(0, last).long().view(shape).expand(sizes))

    a, b = take(lower), take(lower + 1)
    inside = (relative >= 0) & (relative <= 1)
    return (a + (b - a) * (position - lower).view(shape)) * inside.view(shape)


@dataclass(frozen=True)
class TrainLookup:
    """Reads the extras of a training sample, in any process.

    Attributes:
        store: Where they are.
        positions: int64 (M,), position in the store of each training image.
        with_maps: Read maps, too.
    """

    store: Store
    positions: np.ndarray
    with_maps: bool

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        """Return the logits (K,) and the map (C, h, w) of a training image."""
        record = self.store.read("train", int(self.positions[index]))
        extras = {"teacher_logits": _tensor(record["logits"])}
        return {**extras, "teacher_maps": _tensor(record["map"])} if self.with_maps else extras


class FrozenTeacher:
    """Stored logits and maps in place of a teacher.

    Args:
        store: A complete store.
        positions: int64 (M,) by part: position in the store of each image of the data set as it is used.
    """

    def __init__(self, store: Store, positions: Mapping[Part, np.ndarray]) -> None:
        self.store, self.positions = store, positions
        manifest = store.manifest
        self.label = f"{manifest.teacher}, frozen in {store.folder}"
        self.explanation: ExplanationKind = manifest.explanation

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint says about its teacher: with other maps, too, it is another one."""
        return {"label": self.label, "sha256": self.store.manifest.sha256}

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent on the validation images."""
        return self.store.accuracy(self.positions["val"])

    def train_lookup(self, with_maps: bool) -> TrainLookup:
        """Return a function that reads logits, and maps if asked to, of training images."""
        return TrainLookup(self.store, self.positions["train"], with_maps)

    def val_logits(self, indices: Tensor) -> Tensor:
        """Return the logits (N, K) of validation images (N,), on the device of ``indices``."""
        logits = [_tensor(self._val_record(index)["logits"]) for index in indices.tolist()]
        return torch.stack(logits).to(indices.device)

    def val_maps(self, indices: Tensor, height: int, width: int) -> Tensor:
        """Return the maps float32 (N, C, H, W) of validation images (N,), resized, on the device of ``indices``."""
        maps = torch.stack([_tensor(self._val_record(index)["map"]) for index in indices.tolist()])
        windows = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(len(maps), 4)
        return crop_maps(maps.to(indices.device), windows.to(indices.device), height, width)

    def _val_record(self, index: int) -> np.void:
        return self.store.read("val", int(self.positions["val"][index]))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values))  # a copy: values are read-only
