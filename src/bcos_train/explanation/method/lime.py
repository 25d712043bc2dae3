"""LIME: a linear model of the probability of a class as a function of the visible image segments.

Axes: N images, T targets per image, S segments of an image, V perturbed images, H W pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    CannotExplain,
    attribution_context,
    check_positive_integers,
    image_and_encoder,
    import_optional,
    probability_function,
    select_targets,
)

__all__ = ["Lime"]


@dataclass(frozen=True)
class Lime:
    """Mark the segments with the most evidence for the target (Ribeiro et al., 2016, arXiv 1602.04938).

    The map is 1 on these segments and 0 elsewhere. A perturbed image has a random half of its segments replaced by
    their mean color. The coefficients of the segments come from a ridge regression of the target's probability on the
    visible segments, weighted by their similarity to the whole image. The procedure and its defaults follow the
    official evaluation, that is, the package ``lime`` for images. The perturbed image is encoded again for B-cos
    networks.

    All targets share the forward passes. Captum's Lime would repeat them for each target, as it expects one number per
    image; so the regression uses scikit-learn directly, as captum does.

    Args:
        n_samples: V, including the image itself.
        n_features: Maximum number of segments to mark; only segments with a positive coefficient are marked.
        kernel_size, max_dist, ratio: Options of scikit-image's quickshift, which computes the segments.
        kernel_width: Width of the sample weights, exp(-d²/kernel_width²)^½ with d the cosine distance from the whole
            image.
        alpha: Strength of the regression's penalty.
        seed: Seeds the choice of visible segments.
        batch_size: Perturbed images per forward pass.
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
        check_positive_integers(n_samples=self.n_samples, n_features=self.n_features, batch_size=self.batch_size)
        for name in ("kernel_size", "max_dist", "kernel_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a finite number above 0")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: between 0 and 1")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: a finite number of at least 0")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets), torch.no_grad():
            return torch.stack([self._explain(model, *arguments) for arguments in zip(x, targets, strict=True)])

    def _explain(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Explain one image: (T, H, W)."""
        image = image_and_encoder(x[None])[0][0]
        segments = self.segments(image)
        visible = self.draw_visible(int(segments.max()) + 1)
        coefficients = self.fit(visible, self._probabilities(model, x, segments, visible, targets))
        marks = torch.zeros_like(coefficients)
        best = coefficients.topk(min(self.n_features, coefficients.shape[1]), dim=1)
        marks.scatter_(1, best.indices, (best.values > 0).to(marks.dtype))
        return marks[:, segments].to(x)

    def segments(self, image: Tensor) -> Tensor:
        """Compute the segment index of each pixel: (3, H, W) -> (H, W) consecutive integers from 0, on the CPU.

        Raises:
            CannotExplain: The image doesn't have three channels.
        """
        segmentation = import_optional("skimage.segmentation", "scikit-image")
        colors = image.detach().cpu().double()
        if len(colors) != 3:
            # Quickshift compares colors in the Lab space.
            raise CannotExplain(f"LIME segments RGB images, but the model takes {len(image)} channels")
        low, high = colors.min(), colors.max()
        if low < 0 or high > 1:  # for instance standardized
            colors = (colors - low) / (high - low)
        options = {"kernel_size": self.kernel_size, "max_dist": self.max_dist, "ratio": self.ratio}
        labels = segmentation.quickshift(colors.movedim(0, 2).numpy(), **options)
        return torch.from_numpy(np.unique(labels, return_inverse=True)[1].reshape(labels.shape))

    def draw_visible(self, n_segments: int) -> Tensor:
        """Draw each perturbed image's visible segments: (V, S) zeros and ones, the first row ones, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        visible = torch.randint(2, (self.n_samples, n_segments), generator=generator, device="cpu")
        visible[0] = 1
        return visible

    def fit(self, visible: Tensor, probability: Tensor) -> Tensor:
        """Fit the coefficients (T, S) to probabilities (V, T), both in float64 on the CPU."""
        linear_model = import_optional("sklearn.linear_model", "scikit-learn")
        n_segments = visible.shape[1]
        # Cosine distance of each row from a row of ones; 1 if no segment is visible.
        distance = 1 - (visible.double().sum(1) / n_segments).sqrt()
        weights = (-(distance**2) / self.kernel_width**2).exp().sqrt()
        ridge = linear_model.Ridge(alpha=self.alpha)
        ridge.fit(visible.double().numpy(), probability.numpy(), sample_weight=weights.numpy())
        return torch.from_numpy(np.reshape(ridge.coef_, (probability.shape[1], n_segments)))

    def _probabilities(self, model: nn.Module, x: Tensor, segments: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        """Compute the targets' probabilities for each perturbed image: (V, T) in float64 on the CPU."""
        images, encode = image_and_encoder(x[None])
        image, to_probabilities = images[0], probability_function(model)
        mean = _mean_colors(image.cpu(), segments).to(image)
        visible, segments = visible.to(x.device, torch.bool), segments.to(x.device)
        target_probabilities = []
        for rows in visible.split(self.batch_size):
            perturbed = torch.where(rows[:, segments][:, None], image, mean)
            probability = to_probabilities(model(encode(perturbed)))
            target_probabilities.append(select_targets(probability, targets.expand(len(rows), -1)).cpu().double())
        return torch.cat(target_probabilities)


def _mean_colors(image: Tensor, segments: Tensor) -> Tensor:
    """Replace every segment by its mean color: (C, H, W) -> (C, H, W)."""
    n_segments = int(segments.max()) + 1
    flat = segments.flatten()
    sums = image.new_zeros(len(image), n_segments).index_add_(1, flat, image.flatten(1))
    return (sums / flat.bincount(minlength=n_segments))[:, segments]
