"""Gradients averaged over variants of the image: integrated gradients and SmoothGrad.

Captum has both, but it runs a forward pass for each target, and draws its noise from the global random state. Here one
forward pass of a variant serves all targets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import check_counts, explaining, gradients, pairs, perturbable, select

__all__ = ["IntegratedGradients", "SmoothGrad"]

#: ``variant(n, v)``: the model's input (B, C, H, W) for the images n (B,) and their variants v (B,).
Variant = Callable[[Tensor, Tensor], Tensor]


def _weighted_gradients(
    model: nn.Module, variant: Variant, weights: Tensor, factor: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """sum over v of weights[v] * factor * gradient at variant v, summed over the channels.

    Args:
        weights: (V,).
        factor: (N, C, H, W).
        targets: (N, T).

    Returns:
        (N, T, H, W).
    """
    total = factor.new_zeros(*targets.shape, *factor.shape[2:])
    for n, v in pairs(len(factor), len(weights), batch_size, factor.device):
        leaf = variant(n, v).requires_grad_()
        selected = select(model(leaf), targets[n])
        for t, gradient in enumerate(gradients(selected, leaf)):
            total[:, t].index_add_(0, n, weights[v, None, None] * (factor[n] * gradient).sum(1))
    return total


@dataclass(frozen=True)
class IntegratedGradients:
    """x times the mean gradient along the straight way from zero to x (Sundararajan et al., 2017, arXiv 1703.01365).

    The mean is taken by Gauss-Legendre quadrature, as in captum and so in the official evaluation. The way begins at
    zero in all channels of the model's input: for B-cos networks no colour at all rather than black, so its points are
    not encoded images; for standardised RGB the mean colour. The maps of an image sum to the target's logit less
    its logit for zero, up to the error of the quadrature.

    Args:
        n_steps: points of the quadrature.
        batch_size: points in one forward pass.
    """

    n_steps: int = 50
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_counts(n_steps=self.n_steps, batch_size=self.batch_size)

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets):
            nodes, sizes = np.polynomial.legendre.leggauss(self.n_steps)  # on [-1, 1]
            alphas = torch.from_numpy((nodes + 1) / 2).to(x)[:, None, None, None]

            def variant(n: Tensor, v: Tensor) -> Tensor:
                return alphas[v] * x[n]

            weights = torch.from_numpy(sizes / 2).to(x)
            return _weighted_gradients(model, variant, weights, x, targets, self.batch_size)


@dataclass(frozen=True)
class SmoothGrad:
    """The mean gradient at noisy copies of the image (Smilkov et al., 2017, arXiv 1706.03825).

    Noise is added to the image, which is then encoded again; all images of a batch get the same noise, so that an
    image's map doesn't depend on the others.

    Args:
        n_samples: noisy copies.
        noise: standard deviation of the noise, as a part of the image's range of values (largest less smallest).
        seed: of the noise.
        batch_size: copies in one forward pass.
    """

    n_samples: int = 50
    noise: float = 0.15
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_counts(n_samples=self.n_samples, batch_size=self.batch_size)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise}: a finite number of at least 0")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets):
            image, encode = perturbable(x)
            # On the CPU, so that the noise is the same on every device.
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(self.n_samples, *image.shape[1:], generator=generator, device="cpu").to(x)
            deviation = self.noise * (image.amax((1, 2, 3), keepdim=True) - image.amin((1, 2, 3), keepdim=True))

            def variant(n: Tensor, v: Tensor) -> Tensor:
                return encode(image[n] + deviation[n] * noise[v])

            weights = x.new_full((self.n_samples,), 1 / self.n_samples)
            return _weighted_gradients(model, variant, weights, torch.ones_like(x), targets, self.batch_size)
