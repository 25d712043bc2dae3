"""Windows of maps against a slow definition and torchvision's transforms."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from bcos_train.dataset.window import draw_window
from bcos_train.distillation import crop_maps


def reference(maps: Tensor, window: list[float], height: int, width: int) -> Tensor:
    """Bilinear interpolation at the centers of the crop's pixels, one pixel at a time, in float64."""
    x0, y0, x1, y1 = window
    h, w = maps.shape[1:]
    result = torch.zeros(len(maps), height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y, x = y0 + (i + 0.5) / height * (y1 - y0), x0 + (j + 0.5) / width * (x1 - x0)
            if not (0 <= y <= 1 and 0 <= x <= 1):
                continue
            row, column = y * h - 0.5, x * w - 0.5
            for a in (math.floor(row), math.floor(row) + 1):
                for b in (math.floor(column), math.floor(column) + 1):
                    weight = (1 - abs(row - a)) * (1 - abs(column - b))
                    value = maps[:, min(max(a, 0), h - 1), min(max(b, 0), w - 1)].double()
                    result[:, i, j] += weight * value
    return result


@pytest.mark.parametrize(
    "window",
    [[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.6, 0.9], [0.9, 0.2, 0.3, 0.5], [-0.2, -0.1, 0.7, 1.3], [1.2, 0.0, 0.4, 1.0]],
)
def test_the_definition(window: list[float]) -> None:
    maps = torch.randn(2, 6, 5, 7)
    result = crop_maps(maps, torch.tensor([window, window[2:] + window[:2]]), 9, 8)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[0].double(), reference(maps[0], window, 9, 8), atol=2e-3, rtol=0)
    flipped = reference(maps[1], window[2:] + window[:2], 9, 8)
    torch.testing.assert_close(result[1].double(), flipped, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [8, 32, 97, 224, 299])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_whole_images_and_flips_are_exact(size: int, dtype: torch.dtype) -> None:
    maps = torch.randn(2, 2, size, size + 1).to(dtype)
    windows = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 0, 1]])
    result = crop_maps(maps, windows, size, size + 1)
    assert torch.equal(result, torch.stack([maps[0], maps[1].flip(2)]).float())


def test_crops_by_whole_pixels_are_exact() -> None:
    """As in the paper, image and map go through the transform together."""
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)])
    maps = torch.randn(20, 6, 32, 32)
    windows, expected = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        expected.append(transform(maps[seed]))
        torch.manual_seed(seed)
        windows.append(draw_window(transform, 32, 32))
    assert torch.equal(crop_maps(maps, torch.stack(windows), 32, 32), torch.stack(expected))


def test_random_resized_crops() -> None:
    """Away from its edges, the crop is that of torchvision, which repeats the edge of the crop, not of the image."""
    transform = v2.Compose([v2.RandomResizedCrop(96, antialias=False), v2.RandomHorizontalFlip()])
    maps = torch.randn(20, 6, 48, 64)
    windows, expected = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        expected.append(transform(maps[seed]))
        torch.manual_seed(seed)
        windows.append(draw_window(transform, 64, 48))
    result = crop_maps(maps, torch.stack(windows), 96, 96)
    # The smallest crop has 15 pixels on a side: half of one is less than 5 of 96.
    inner = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(result[inner], torch.stack(expected)[inner], atol=3e-3, rtol=0)
