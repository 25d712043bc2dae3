"""Adaptive gradient clipping (Brock et al., arXiv 2102.06171, eq. 3)."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

#: Weight and gradient of one parameter as views (units, ...) of equal shape.
_Pair = tuple[Tensor, Tensor]

#: Smallest gradient norm that is divided by, as in timm and the official code.
_MIN_GRADIENT_NORM = 1e-6


def adaptive_clip_grad_(parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Scale down, in place, each unit's gradient to at most ``clip_factor`` times the norm of the unit's weight.

    A unit is a row of a matrix or an output channel of a convolution. A parameter with one axis longer than 1 is one
    unit; in a parameter with three axes (an embedding ``(1, tokens, features)``) a unit runs along the second. These
    are the units of the official B-cos code. The result equals timm's ``adaptive_clip_grad`` on these units, on a CPU
    bit for bit.

    Args:
        parameters: Tensors with or without ``grad``.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Smallest weight norm that counts, so that weights at zero can move.
    """
    # Parameters whose units have the same length are clipped as rows of one matrix. One parameter at a time takes ten
    # small operations each: 1070 for a ResNet-50, whose launches alone cost a GPU milliseconds a step.
    groups: dict[tuple[torch.dtype, torch.device], dict[Hashable, list[_Pair]]] = defaultdict(lambda: defaultdict(list))
    pairs = (pair for p in parameters if p.grad is not None for pair in _units(p.detach(), p.grad.detach()))
    for i, (weight, grad) in enumerate(pairs):
        # Strided units stay alone: copied into a matrix, they would be summed up in another order.
        is_joined = _joins_on(grad.device) and weight.is_contiguous() and grad.is_contiguous()
        groups[grad.dtype, grad.device][grad[0].numel() if is_joined else f"alone {i}"].append((weight, grad))
    for by_length in groups.values():
        _clip(list(by_length.values()), clip_factor, eps)


def _joins_on(device: torch.device) -> bool:
    """True if copying units into one matrix is cheaper than operations on each parameter."""
    # On a CPU the copies cost more than the calls that they save (ResNet-18: 73 ms instead of 12 ms).
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
    """(U, ...) each -> (sum of U, K): a copy for several tensors, a view where possible for one."""
    return tensors[0].flatten(1) if len(tensors) == 1 else torch.cat([x.flatten(1) for x in tensors])


def _units(weight: Tensor, grad: Tensor) -> Iterator[_Pair]:
    """Views of weight and gradient whose first axis counts the official units."""
    if weight.squeeze().ndim <= 1:
        yield weight.reshape(1, -1), _flat_view(grad)[None]
    elif weight.ndim == 3:
        for w, g in zip(weight, grad, strict=True):
            yield w.T, g.T
    else:
        yield _in_memory_order(weight), _in_memory_order(grad)


def _in_memory_order(x: Tensor) -> Tensor:
    """Permute all axes but the first so that their flattening is a view of any dense layout, channels_last included.

    The order within a unit doesn't matter to its norm.
    """
    order = sorted(range(1, x.ndim), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    return x.permute(0, *order)


def _flat_view(grad: Tensor) -> Tensor:
    """A 1-D view (never a copy: clipping writes through it) of a tensor with at most one axis longer than 1."""
    (stride,) = [s for n, s in zip(grad.shape, grad.stride(), strict=True) if n > 1] or [1]
    return torch.as_strided(grad, (grad.numel(),), (stride,), grad.storage_offset())
