"""MaxOut for the fused operations: the candidates of a unit in blocks, not side by side.

A weight holds the M candidates of each unit one after the other, so that the greatest of them is a maximum over short
rows, which is slow. With the weight's rows in another order (and a weight is small) the first candidates of all units
come first, then the second ones, and the maximum is one of whole blocks.

Axes: G groups, U units of a group, M candidates of a unit.
"""

import torch
from torch import Tensor

from bcos_train.nn.fast.gpu_device import is_on_gpu

__all__ = ["blocked_maxout", "from_blocked", "maxout_with_indices", "scatter_to_chosen", "to_blocked"]


def to_blocked(weight: Tensor, candidates: int, groups: int) -> Tensor:
    """(G * U * M, ...) -> (G * M * U, ...)."""
    if candidates == 1:
        return weight
    return _swap_rows(weight, (groups, -1, candidates))


def from_blocked(weight: Tensor, candidates: int, groups: int) -> Tensor:
    """The inverse of `to_blocked`."""
    if candidates == 1:
        return weight
    return _swap_rows(weight, (groups, candidates, -1))


def _swap_rows(weight: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """(A * B * C, ...) -> (A * C * B, ...); on a GPU in the memory order of ``weight``."""
    rows = weight.unflatten(0, sizes).transpose(1, 2)
    if not is_on_gpu(weight):  # on a CPU the layout of the weight would decide that of the output, and its rounding
        return rows.flatten(0, 2)
    # Otherwise a weight in channels last is copied back by each convolution, and its gradient once more.
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    in_memory_order = rows.permute(0, 1, 2, *(axis + 2 for axis in order)).flatten(0, 2)
    return in_memory_order.permute(0, *(order.index(axis) + 1 for axis in range(1, weight.dim())))


def blocked_maxout(out: Tensor, candidates: int, dim: int) -> Tensor:
    """The greatest candidate of each unit, axis `dim` M * U -> U; of equals, the first gets the gradient."""
    if candidates == 1:
        return out
    best, *others = out.unflatten(dim, (candidates, -1)).unbind(dim)
    for other in others:
        # `maximum`, which is faster, would split the gradient of equals.
        best = torch.where(other > best, other, best) if out.requires_grad else torch.maximum(best, other)
    return best


def maxout_with_indices(out: Tensor, candidates: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """`blocked_maxout` without a gradient, and which of the candidates it was, None for a single one."""
    if candidates == 1:
        return out, None
    best, *others = out.unflatten(dim, (candidates, -1)).unbind(dim)
    choice = None
    for index, other in enumerate(others, start=1):
        is_greater = other > best
        # A bool is a byte of 0 or 1.
        choice = is_greater.view(torch.uint8) if choice is None else choice.masked_fill_(is_greater, index)
        best = torch.maximum(best, other)
    return best, choice


def scatter_to_chosen(grad: Tensor, choice: Tensor, candidates: int, dim: int) -> Tensor:
    """The adjoint of `maxout_with_indices`, axis `dim` U -> M * U: the gradient to the chosen one, 0 to the others."""
    shape = list(grad.shape)
    shape[dim] *= candidates
    # The layout of `grad`, with the larger axis in the same place.
    order = sorted(range(grad.dim()), key=grad.stride, reverse=True)
    into = grad.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(grad.dim())])
    first, *others = into.unflatten(dim, (candidates, -1)).unbind(dim)
    rest = grad
    for index, part in enumerate(others, start=1):
        torch.mul(grad, choice.view(torch.bool) if candidates == 2 else choice == index, out=part)
        # What the others leave, exactly; a subtraction is faster than a product with a mask.
        rest = torch.sub(rest, part, out=first)
    return into
