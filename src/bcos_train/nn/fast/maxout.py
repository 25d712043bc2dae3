"""MaxOut for the fused operations.

The rows of a weight are the M candidates of the first unit, then those of the second, and so on. A maximum over M
adjacent values is slow. So the rows of the weight, which is small, are reordered: the first candidates of all units,
then the second ones, and so on. The maximum is then taken elementwise over M blocks.

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
    """Invert `to_blocked`."""
    if candidates == 1:
        return weight
    return _swap_rows(weight, (groups, candidates, -1))


def _swap_rows(weight: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """(A * B * C, ...) -> (A * C * B, ...); on a GPU in the memory order of ``weight``."""
    rows = weight.unflatten(0, sizes).transpose(1, 2)
    if not is_on_gpu(weight):  # on a CPU the weight's layout would change the output's, and its rounding
        return rows.flatten(0, 2)
    # Otherwise each convolution would copy a channels-last weight back to its layout, and its gradient too.
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    in_memory_order = rows.permute(0, 1, 2, *(axis + 2 for axis in order)).flatten(0, 2)
    return in_memory_order.permute(0, *(order.index(axis) + 1 for axis in range(1, weight.dim())))


def blocked_maxout(out: Tensor, candidates: int, dim: int) -> Tensor:
    """Return the largest candidate of each unit, axis `dim` M * U -> U; among equals, the first gets the gradient."""
    if candidates == 1:
        return out
    best, *others = out.unflatten(dim, (candidates, -1)).unbind(dim)
    for other in others:
        # `maximum` is faster, but divides the gradient among equal candidates.
        best = torch.where(other > best, other, best) if out.requires_grad else torch.maximum(best, other)
    return best


def maxout_with_indices(out: Tensor, candidates: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """Return `blocked_maxout` without a gradient, and the index of the candidate; None if there is only one."""
    if candidates == 1:
        return out, None
    best, *others = out.unflatten(dim, (candidates, -1)).unbind(dim)
    choice = None
    for index, other in enumerate(others, start=1):
        is_greater = other > best
        # A bool is stored as a byte 0 or 1, so no conversion is needed.
        choice = is_greater.view(torch.uint8) if choice is None else choice.masked_fill_(is_greater, index)
        best = torch.maximum(best, other)
    return best, choice


def scatter_to_chosen(grad: Tensor, choice: Tensor, candidates: int, dim: int) -> Tensor:
    """Assign the gradient to the chosen candidate and 0 to the others, axis `dim` U -> M * U."""
    shape = list(grad.shape)
    shape[dim] *= candidates
    # The layout of `grad`, with the larger axis in the same place.
    order = sorted(range(grad.dim()), key=grad.stride, reverse=True)
    into = grad.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(grad.dim())])
    first, *others = into.unflatten(dim, (candidates, -1)).unbind(dim)
    rest = grad
    for index, part in enumerate(others, start=1):
        torch.mul(grad, choice.view(torch.bool) if candidates == 2 else choice == index, out=part)
        # The first candidate gets the remainder, which is exact; subtracting is faster than multiplying by a mask.
        rest = torch.sub(rest, part, out=first)
    return into
