"""Adaptive gradient clipping (Brock et al., arXiv 2102.06171, eq. 3)."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

#: Weight and gradient of one parameter as views (units, ...) of equal shape.
_Pair = tuple[Tensor, Tensor]

#: Lower bound of the gradient norm in the division, as in timm and the official code.
_MIN_GRADIENT_NORM = 1e-6


def adaptive_clip_grad_(parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Clip the gradient of each unit, in place, to a norm of at most ``clip_factor`` times the norm of its weight.

    A unit is a row of a matrix or an output channel of a convolution. A parameter with at most one axis longer than 1
    is one unit; in a parameter with three axes (an embedding ``(1, tokens, features)``) a unit runs along the second.
    These are the units of the official B-cos code. The result equals timm's ``adaptive_clip_grad`` on these units,
    bit-identically on a CPU.

    Args:
        parameters: Tensors with or without ``grad``.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Lower bound of the weight norm, so that weights at zero can still be updated.
    """
    # Parameters whose units have the same length are clipped as rows of one matrix. Clipping each parameter separately
    # takes ten small operations: 1070 for a ResNet-50, whose launches alone take milliseconds per step on a GPU.
    groups: dict[tuple[torch.dtype, torch.device], dict[Hashable, list[_Pair]]] = defaultdict(lambda: defaultdict(list))
    pairs = (pair for p in parameters if p.grad is not None for pair in _units(p.detach(), p.grad.detach()))
    for i, (weight, grad) in enumerate(pairs):
        # Strided units are not joined: copied into a matrix, they would be summed in a different order.
        is_joined = _joins_on(grad.device) and weight.is_contiguous() and grad.is_contiguous()
        groups[grad.dtype, grad.device][grad[0].numel() if is_joined else f"alone {i}"].append((weight, grad))
    for by_length in groups.values():
        _clip(list(by_length.values()), clip_factor, eps)


def _joins_on(device: torch.device) -> bool:
    """True if copying units into one matrix is cheaper than separate operations for each parameter."""
    # On a CPU the copies take longer than the calls that they save (ResNet-18: 73 ms instead of 12 ms).
    return device.type != "cpu"


def _clip(groups: Sequence[Sequence[_Pair]], clip_factor: float, eps: float) -> None:
    """Clip groups of parameters of one dtype and device; within a group all units have the same length."""
    grads = [_rows([grad for _, grad in group]) for group in groups]
    weight_norms = [torch.linalg.vector_norm(_rows([weight for weight, _ in group]), dim=1) for group in groups]
    max_norm = torch.cat(weight_norms).clamp_(min=eps).mul_(clip_factor)
    norm = torch.cat([torch.linalg.vector_norm(grad, dim=1) for grad in grads])
    factor = torch.where(norm < max_norm, 1.0, max_norm / norm.clamp(min=_MIN_GRADIENT_NORM))
    for group, rows, factors in zip(groups, grads, factor.split([len(rows) for rows in grads]), strict=True):
        targets = [grad for _, grad in group]
        if len(targets) == 1:
            targets[0].mul_(factors.view(-1, *[1] * (targets[0].ndim - 1)))
            continue
        parts = rows.mul_(factors[:, None]).split([len(target) for target in targets])
        torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten tensors (U, ...) and concatenate them to (sum of U, K); a single tensor stays a view where possible."""
    return tensors[0].flatten(1) if len(tensors) == 1 else torch.cat([x.flatten(1) for x in tensors])


def _units(weight: Tensor, grad: Tensor) -> Iterator[_Pair]:
    """Yield views of weight and gradient whose first axis indexes the official units."""
    if weight.squeeze().ndim <= 1:
        yield weight.reshape(1, -1), _flat_view(grad)[None]
    elif weight.ndim == 3:
        for w, g in zip(weight, grad, strict=True):
            yield w.T, g.T
    else:
        yield _in_memory_order(weight), _in_memory_order(grad)


def _in_memory_order(x: Tensor) -> Tensor:
    """Permute all axes but the first such that flattening them is a view for any dense layout, such as channels_last.

    The norm of a unit doesn't depend on the order within it.
    """
    order = sorted(range(1, x.ndim), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return x.permute(0, *order)


def _flat_view(grad: Tensor) -> Tensor:
    """Return a 1-D view of a tensor with at most one axis longer than 1; never a copy, as clipping writes to it."""
    (stride,) = [s for n, s in zip(grad.shape, grad.stride(), strict=True) if n > 1] or [1]
    return torch.as_strided(grad, (grad.numel(),), (stride,), grad.storage_offset())
