"""The subject of an evaluation: a classifier and the validation images that its explanations are measured on.

Axes: M validation images, N images of a batch, G grids, K = n² cells of a grid, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.evaluation.options import GridPointingOptions
from bcos_train.explanation import evaluating
from bcos_train.loading import LoadedClassifier
from bcos_train.metric import choose_grids, compose_grids

__all__ = ["Predictions", "Subject", "draw_grids", "grid_incompatibility", "grid_input", "grid_pictures"]


@dataclass(frozen=True)
class Predictions:
    """Predictions of a validation for each image of the data set.

    Attributes:
        labels: (M,) integers.
        predictions: (M,) integers.
        confidences: (M,), probability of the predicted class: sigmoid or softmax, depending on the loss.
    """

    labels: Tensor
    predictions: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class Subject:
    """A classifier and its images.

    Attributes:
        classifier: The classifier.
        pictures: Indices in the validation set -> uint8 RGB (N, 3, H, W).
        images: Indices of the images that all metrics but the grid pointing game are measured on.
        boxes: Indices in the validation set -> boxes (N, M, 5), see :class:`~bcos_train.dataset.batch.Batch`; ``None``:
            the data set has none.
        predictions: Predictions for the whole validation set; ``None``: skip the grid pointing game.
    """

    classifier: LoadedClassifier
    pictures: Callable[[Sequence[int]], Tensor]
    images: Sequence[int]
    predictions: Predictions | None = None
    boxes: Callable[[Sequence[int]], Tensor] | None = None

    @property
    def model(self) -> nn.Module:
        """The classifier's model: (N, C, H, W) -> logits (N, K)."""
        return self.classifier.model

    def load(self, indices: Sequence[int]) -> Tensor:
        """Load images as the model's input: (N, C, H, W)."""
        return self.classifier.encode(self.pictures(indices))


def draw_grids(predictions: Predictions, options: GridPointingOptions) -> Tensor:
    """Draw the images of each grid: (G, K) indices in the validation set."""
    return choose_grids(
        predictions.labels,
        predictions.predictions,
        predictions.confidences,
        options.n,
        options.n_grids,
        threshold=options.threshold,
        seed=options.seed,
    )


def grid_input(subject: Subject, grids: Tensor, options: GridPointingOptions) -> Tensor:
    """Compose grids as the model sees them.

    Args:
        grids: (G, K) indices in the validation set.

    Returns:
        (G, C, n H, n W), with ``rescale`` (G, C, n ⌊H/n⌋, n ⌊W/n⌋).
    """
    return _compose(subject.load(grids.flatten().tolist()), grids, options)


def grid_pictures(subject: Subject, grids: Tensor, options: GridPointingOptions) -> Tensor:
    """Compose grids for display: RGB (G, 3, n H, n W) in [0, 1], or smaller as for :func:`grid_input`."""
    return _compose(subject.pictures(grids.flatten().tolist()).float() / 255, grids, options)


def _compose(images: Tensor, grids: Tensor, options: GridPointingOptions) -> Tensor:
    if options.rescale:
        # Encoding and interpolation are both linear with weights that sum to 1: their order doesn't matter.
        size = [side // options.n for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return compose_grids(images.contiguous().unflatten(0, (len(grids), -1)))


@torch.no_grad()
def grid_incompatibility(subject: Subject, grids: Tensor, options: GridPointingOptions) -> str | None:
    """Return the reason why the model cannot process grids, or None."""
    if not len(grids):
        return (
            f"no grid of {options.n}x{options.n} classes: too few images are classified correctly with a confidence "
            f"above {options.threshold}"
        )
    if options.stride is not None:
        return None
    x = grid_input(subject, grids[:1], options)
    try:
        with evaluating(subject.model):
            subject.model(x)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        size = "x".join(map(str, x.shape[2:]))
        message = " ".join(str(error).split())
        return (
            f"the model takes no grid of {size} pixels ({message}): explanation.grid_pointing.rescale=true shrinks the "
            "cells, explanation.grid_pointing.stride=… moves a window over the grid"
        )
    return None
