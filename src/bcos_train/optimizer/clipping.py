"""Adaptive gradient clipping (Brock et al., arXiv 2102.06171, eq. 3)."""

from collections.abc import Iterable, Iterator

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor


def adaptive_clip_grad_(parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Scale down, in place, each unit's gradient to at most ``clip_factor`` times the norm of the unit's weight.

    A unit is a row of a matrix or an output channel of a convolution. A parameter with one axis longer than 1 is one
    unit; in a parameter with three axes (an embedding ``(1, tokens, features)``) a unit runs along the second. These
    are the units of the official B-cos code; timm, which does the work here, splits the latter two kinds otherwise.

    Args:
        parameters: Tensors with or without ``grad``.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Smallest weight norm that counts, so that weights at zero can move.
    """
    units = [unit for p in parameters if p.grad is not None for unit in _as_timm_units(p.detach(), p.grad.detach())]
    adaptive_clip_grad(units, clip_factor=clip_factor, eps=eps)


def _as_timm_units(weight: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Views of weight and gradient whose units, as timm takes them (all axes but the first), are the official ones."""
    pairs: list[tuple[Tensor, Tensor]]
    if weight.squeeze().ndim <= 1:
        pairs = [(weight.reshape(-1), _flat_view(grad))]
    elif weight.ndim == 3:
        pairs = [(w.T, g.T) for w, g in zip(weight, grad, strict=True)]
    else:
        pairs = [(weight, grad)]
    for w, g in pairs:
        unit = w.detach()
        unit.grad = g
        yield unit


def _flat_view(grad: Tensor) -> Tensor:
    """A 1-D view (never a copy: clipping writes through it) of a tensor with at most one axis longer than 1."""
    (stride,) = [s for n, s in zip(grad.shape, grad.stride(), strict=True) if n > 1] or [1]
    return torch.as_strided(grad, (grad.numel(),), (stride,), grad.storage_offset())
