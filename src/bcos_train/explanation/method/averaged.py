"""Gradients averaged over variants of the image: integrated gradients and SmoothGrad.

Captum has both, but runs a forward pass per target and draws its noise from the global random state. Here all targets
share one forward pass per variant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    attribution_context,
    check_positive_integers,
    image_and_encoder,
    image_variant_batches,
    select_targets,
    target_gradients,
)

__all__ = ["IntegratedGradients", "SmoothGrad"]

#: ``variant(n, v)`` returns the model's input (B, C, H, W) for the images n (B,) and their variants v (B,).
Variant = Callable[[Tensor, Tensor], Tensor]


def _weighted_gradients(
    model: nn.Module, variant: Variant, weights: Tensor, factor: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """Sum weights[v] * factor * gradient at variant v over all variants v and the channels.

    Args:
        weights: (V,).
        factor: (N, C, H, W).
        targets: (N, T).

    Returns:
        (N, T, H, W).
    """
    total = factor.new_zeros(*targets.shape, *factor.shape[2:])
    for n, v in image_variant_batches(len(factor), len(weights), batch_size, factor.device):
        leaf = variant(n, v).requires_grad_()
        selected = select_targets(model(leaf), targets[n])
        for t, gradient in enumerate(target_gradients(selected, leaf)):
            total[:, t].index_add_(0, n, weights[v, None, None] * (factor[n] * gradient).sum(1))
    return total


@dataclass(frozen=True)
class IntegratedGradients:
    """Compute x times the mean gradient on the line from zero to x (Sundararajan et al., 2017, arXiv 1703.01365).

    The mean uses Gauss-Legendre quadrature, as in captum and therefore in the official evaluation. The baseline is zero
    in all channels of the model's input: the mean color for standardized RGB; for B-cos networks not black, so the
    points on the line are not encoded images. A map sums to the target's logit minus its logit for the baseline, up to
    the quadrature error.

    Args:
        n_steps: Quadrature points.
        batch_size: Points per forward pass.
    """

    n_steps: int = 50
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_positive_integers(n_steps=self.n_steps, batch_size=self.batch_size)

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets):
            nodes, node_weights = np.polynomial.legendre.leggauss(self.n_steps)  # on [-1, 1]
            alphas = torch.from_numpy((nodes + 1) / 2).to(x)[:, None, None, None]

            def variant(n: Tensor, v: Tensor) -> Tensor:
                return alphas[v] * x[n]

            weights = torch.from_numpy(node_weights / 2).to(x)
            return _weighted_gradients(model, variant, weights, x, targets, self.batch_size)


@dataclass(frozen=True)
class SmoothGrad:
    """Compute the mean gradient over noisy copies of the image (Smilkov et al., 2017, arXiv 1706.03825).

    Noise is added to the image, which is then encoded again. All images of a batch get the same noise, so that a map
    doesn't depend on the rest of the batch.

    Args:
        n_samples: Noisy copies per image.
        noise: Standard deviation of the noise, as a fraction of the image's value range (maximum minus minimum).
        seed: Seeds the noise.
        batch_size: Copies per forward pass.
    """

    n_samples: int = 50
    noise: float = 0.15
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_positive_integers(n_samples=self.n_samples, batch_size=self.batch_size)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise}: a finite number of at least 0")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets):
            image, encode = image_and_encoder(x)
            # Drawn on the CPU, so that the noise is the same on every device.
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(self.n_samples, *image.shape[1:], generator=generator, device="cpu").to(x)
            deviation = self.noise * (image.amax((1, 2, 3), keepdim=True) - image.amin((1, 2, 3), keepdim=True))

            def variant(n: Tensor, v: Tensor) -> Tensor:
                return encode(image[n] + deviation[n] * noise[v])

            weights = x.new_full((self.n_samples,), 1 / self.n_samples)
            return _weighted_gradients(model, variant, weights, torch.ones_like(x), targets, self.batch_size)
