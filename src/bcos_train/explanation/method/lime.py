"""LIME: a linear model of how the probability of a class depends on which segments of the image are shown.

Axes: N images, T targets of each image, S segments of an image, V perturbed images, H W pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    CannotExplain,
    check_counts,
    explaining,
    library,
    perturbable,
    probabilities,
    select,
)

__all__ = ["Lime"]


@dataclass(frozen=True)
class Lime:
    """1 on the segments that speak most for the target, 0 elsewhere (Ribeiro et al., 2016, arXiv 1602.04938).

    A perturbed image has a random half of the segments in their mean colour. A ridge regression of the target's
    probability on the segments that are shown, weighted by their likeness to the whole image, gives each segment's
    coefficient. All of that, and the defaults, are as in the official evaluation, that is in the package ``lime`` for
    images. B-cos networks see the perturbed image encoded anew.

    The forward passes serve all targets. Captum's Lime would run them again for each one, as it takes one number from
    an image, so the regression is scikit-learn's, on which captum's is built too.

    Args:
        n_samples: V, the image itself among them.
        n_features: segments that are marked at most; only those with a positive coefficient are.
        kernel_size, max_dist, ratio: of the segments, by quickshift (scikit-image).
        kernel_width: of the weights, exp(-d²/kernel_width²)^½ with d the cosine distance from the whole image.
        alpha: strength of the regression's penalty.
        seed: of the choice of segments.
        batch_size: perturbed images in one forward pass.
    """

    n_samples: int = 500
    n_features: int = 5
    kernel_size: float = 4
    max_dist: float = 200
    ratio: float = 0.2
    kernel_width: float = 0.25
    alpha: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(n_samples=self.n_samples, n_features=self.n_features, batch_size=self.batch_size)
        for name in ("kernel_size", "max_dist", "kernel_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a finite number above 0")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: between 0 and 1")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: a finite number of at least 0")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets), torch.no_grad():
            return torch.stack([self._explain(model, *one) for one in zip(x, targets, strict=True)])

    def _explain(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """(T, H, W) of one image."""
        image = perturbable(x[None])[0][0]
        segments = self.segments(image)
        shown = self.draw(int(segments.max()) + 1)
        coefficients = self.fit(shown, self._probabilities(model, x, segments, shown, targets))
        marks = torch.zeros_like(coefficients)
        best = coefficients.topk(min(self.n_features, coefficients.shape[1]), dim=1)
        marks.scatter_(1, best.indices, (best.values > 0).to(marks.dtype))
        return marks[:, segments].to(x)

    def segments(self, image: Tensor) -> Tensor:
        """Number of the segment of each pixel: (3, H, W) -> (H, W) integers from 0 without a gap, on the CPU.

        Raises:
            CannotExplain: the image doesn't have three channels.
        """
        segmentation = library("skimage.segmentation", "scikit-image")
        colours = image.detach().cpu().double()
        if len(colours) != 3:
            # Quickshift measures colours in the Lab space.
            raise CannotExplain(f"LIME segments RGB images, and the model takes {len(image)} channels")
        low, high = colours.min(), colours.max()
        if low < 0 or high > 1:  # standardised, or the like
            colours = (colours - low) / (high - low)
        options = {"kernel_size": self.kernel_size, "max_dist": self.max_dist, "ratio": self.ratio}
        found = segmentation.quickshift(colours.movedim(0, 2).numpy(), **options)
        return torch.from_numpy(np.unique(found, return_inverse=True)[1].reshape(found.shape))

    def draw(self, n_segments: int) -> Tensor:
        """Which segments each perturbed image shows: (V, S) of zeros and ones, all ones in the first, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        shown = torch.randint(2, (self.n_samples, n_segments), generator=generator, device="cpu")
        shown[0] = 1
        return shown

    def fit(self, shown: Tensor, probability: Tensor) -> Tensor:
        """The regression's coefficients (T, S) for probabilities (V, T), both in float64 on the CPU."""
        linear_model = library("sklearn.linear_model", "scikit-learn")
        n_segments = shown.shape[1]
        # Of the rows from a row of ones; with nothing shown it is 1.
        distance = 1 - (shown.double().sum(1) / n_segments).sqrt()
        weights = (-(distance**2) / self.kernel_width**2).exp().sqrt()
        ridge = linear_model.Ridge(alpha=self.alpha)
        ridge.fit(shown.double().numpy(), probability.numpy(), sample_weight=weights.numpy())
        return torch.from_numpy(np.reshape(ridge.coef_, (probability.shape[1], n_segments)))

    def _probabilities(self, model: nn.Module, x: Tensor, segments: Tensor, shown: Tensor, targets: Tensor) -> Tensor:
        """Of the targets for each perturbed image: (V, T) in float64 on the CPU."""
        images, encode = perturbable(x[None])
        image, to_probabilities = images[0], probabilities(model)
        mean = _mean_colours(image.cpu(), segments).to(image)
        shown, segments = shown.to(x.device, torch.bool), segments.to(x.device)
        found = []
        for rows in shown.split(self.batch_size):
            perturbed = torch.where(rows[:, segments][:, None], image, mean)
            probability = to_probabilities(model(encode(perturbed)))
            found.append(select(probability, targets.expand(len(rows), -1)).cpu().double())
        return torch.cat(found)


def _mean_colours(image: Tensor, segments: Tensor) -> Tensor:
    """The image with every segment in its mean colour: (C, H, W) -> (C, H, W)."""
    n_segments = int(segments.max()) + 1
    flat = segments.flatten()
    sums = image.new_zeros(len(image), n_segments).index_add_(1, flat, image.flatten(1))
    return (sums / flat.bincount(minlength=n_segments))[:, segments]
