"""Weights scaled to unit norm."""

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.nn.autocast import autocast_dtype
from bcos_train.nn.functional import normalise_weight, statistics_dtype
from bcos_train.nn.gpu.device import uses_triton
from bcos_train.nn.gpu.ops import OPS
from bcos_train.nn.observers import is_plain
from bcos_train.nn.scratch import inner_products

__all__ = ["FROZEN", "Freezable", "UnitWeight", "plain_backward"]


class _Frozen(threading.local):
    """What :func:`bcos_train.nn.frozen_weights` has put in the place of weights and norms, in this thread.

    Not kept in the modules: another thread that uses the same model, or a copy of it, has nothing to do with it.
    """

    def __init__(self) -> None:
        #: Modules with what they are to compute with.
        self.weights: dict[nn.Module, Tensor] = {}
        #: Norms that the layer before has taken over.
        self.norms: set[nn.Module] = set()


FROZEN = _Frozen()


class Freezable(nn.Module):
    """A module with a `weight` that can be computed with as it is now, without a gradient."""

    weight: Tensor

    @property
    def frozen(self) -> Tensor | None:
        """What takes the place of the weight in use, if anything; never where only plain operations will do.

        Raises:
            RuntimeError: The module has been moved or cast since.
        """
        found = None if is_plain() else FROZEN.weights.get(self)
        if found is not None and (found.dtype, found.device) != (self.weight.dtype, self.weight.device):
            raise RuntimeError("the model was moved or cast within frozen_weights(): do that before")
        return found

    @abstractmethod
    def weight_in_use(self) -> Tensor:
        """What the module computes with."""


class UnitWeight(Freezable):
    """A module with a `weight` that is used only after scaling every output unit (the first axis) to unit norm."""

    def weight_in_use(self) -> Tensor:
        return normalise_weight(self.weight)

    def unit_weight(self) -> Tensor:
        """ŵ = w / ||w||, of the shape of the weight; the frozen one where there is one.

        On a GPU it is in the dtype that autocast would cast it to.
        """
        if (found := self.frozen) is not None:
            return found
        weight = self.weight
        if is_plain():
            return normalise_weight(weight)
        if uses_triton(weight) and weight.numel() > 0 and _is_dense(weight):
            return _NormalizeOnGPU.apply(weight, autocast_dtype(weight) or weight.dtype)
        return _Normalise.apply(weight)


class _Normalise(torch.autograd.Function):
    """ŵ = w / ||w||; its derivative is the projection onto what is perpendicular to ŵ, divided by ||w||."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(_rows(weight, weight), dim=1, dtype=statistics_dtype(weight))
        unit = (weight / norm.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        ctx.save_for_backward(weight, unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        weight, unit, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_backward(normalise_weight, (weight,), grad)[0]
        shape = (-1, *[1] * (weight.dim() - 1))
        along = inner_products(_rows(grad, unit), _rows(unit, unit), norm.dtype)
        return torch.addcmul(grad, unit, -along.view(shape).to(grad.dtype)).div_(norm.view(shape))


class _NormalizeOnGPU(torch.autograd.Function):
    """The same in two launches, where the eager operations take nine, and the casts of autocast two more."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        unit, norm = OPS.normalize.default(weight, dtype)
        ctx.save_for_backward(weight, norm)
        ctx.dtype = dtype
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_backward(lambda weight: normalise_weight(weight).to(ctx.dtype), (weight,), grad)[0], None
        if grad.stride() != weight.stride():
            grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        return OPS.normalize_backward.default(grad, weight, norm), None


def _is_dense(weight: Tensor) -> bool:
    """True if the values of each output unit lie side by side in memory."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """(O, ...) -> (O, the rest), in the order in which the values of `weight` lie in memory: a view of that one."""
    if weight.dim() == 4 and not weight.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def plain_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients of the inputs with a graph of their own, from plain operations."""
    needed = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), needed, grad, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]
