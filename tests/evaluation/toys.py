"""A B-cos network and images small enough to be measured in milliseconds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.dataset import BcosEncoding
from bcos_train.evaluation import (
    ExplanationOptions,
    GridPointingOptions,
    PerturbationOptions,
    Predictions,
    StabilityOptions,
    Subject,
)
from bcos_train.loading import LoadedClassifier
from bcos_train.nn import BcosConv2d, make_norm

SIDE, N_IMAGES, N_CLASSES = 8, 40, 5


class TinyNet(nn.Module):
    """Two B-cos convolutions with separate features and head, and no ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = BcosConv2d(6, 8, 3, padding=1)
        self.norm = make_norm("bnu-linear")(8)
        self.head = BcosConv2d(8, N_CLASSES, 1)
        self.eval()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward_head(self, x: Tensor) -> Tensor:
        return 4 * self.head(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (N_IMAGES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def boxes(indices: Sequence[int]) -> Tensor:
    """Image i has a box of class i % 5, for even i two, and for i % 3 = 0 an empty one and one of class 4."""
    result = torch.full((len(indices), 4, 5), -1)
    for rows, i in zip(result, indices, strict=True):
        rows[0] = torch.tensor([i % N_CLASSES, 1, 2, 4, 7])
        if i % 2 == 0:
            rows[1] = torch.tensor([i % N_CLASSES, 3, 0, 8, 3])
        if i % 3 == 0:
            rows[2:] = torch.tensor([[0, 2, 2, 2, 5], [4, 0, 0, SIDE, SIDE]])
    return result


def make_subject(
    model: nn.Module | None = None, images: Sequence[int] = (3, 1, 4, 15, 9, 2, 6), has_boxes: bool = True
) -> Subject:
    """All images but every third are classified correctly, with differing confidence."""
    every = torch.arange(N_IMAGES)
    labels = every % N_CLASSES
    predictions = torch.where(every % 3 == 0, (labels + 1) % N_CLASSES, labels)
    confidences = (every * 7 % N_IMAGES) / N_IMAGES
    all_pixels = pixels()
    names = [f"class {k}" for k in range(N_CLASSES)]
    classifier = LoadedClassifier(TinyNet() if model is None else model, "toy", tuple(names), encoding=BcosEncoding())
    return Subject(
        classifier,
        lambda indices: all_pixels[list(indices)],
        list(images),
        Predictions(labels, predictions, confidences),
        boxes if has_boxes else None,
    )


def make_options(**changes: Any) -> ExplanationOptions:
    """Make options; ``grid`` changes those of the grid pointing game."""
    grid = {"n": 2, "n_grids": 5, "smooth": 3, "threshold": 0.2, "rescale": False, "stride": None, "seed": 0}
    grid |= changes.pop("grid", {})
    values = {
        "methods": ["bcos", "ixg", "grad_cam"],
        "metrics": ["grid_pointing", "sparsity"],
        "n_images": 7,
        "batch_size": 8,
        "every_n_epochs": 1,
        "gallery_images": 0,
        "grid_pointing": GridPointingOptions(**grid),
        "perturbation": PerturbationOptions(block=2),
        "stability": StabilityOptions(shift=1, noise_std=0.05, noise_samples=2),
    }
    return ExplanationOptions(**{**values, **changes})
