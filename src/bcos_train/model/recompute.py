"""Blocks whose inside is computed again in the backward pass rather than kept: less memory, the same numbers.

PyTorch calls it activation checkpointing, timm gradient checkpointing (Chen et al. 2016, arXiv 1604.06174). Of each
block only the input is kept; the price is one more forward pass of the blocks in each training step.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bcos_train.nn import Detachable

__all__ = ["Blocks", "set_grad_checkpointing"]


class Blocks(nn.Sequential):
    """Modules one after the other, of which each, or a few together, may be computed again in the backward pass.

    That happens in training mode alone, and not in explanation mode.
    """

    # Class attributes, as `Detachable.detach` is.
    grad_checkpointing: bool = False
    #: Of how many modules each block consists; those that are left over are a block each.
    lengths: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return super().forward(x)
        modules, lengths = list(self), list(self.lengths)
        while modules:
            length = lengths.pop(0) if lengths else 1
            x = self.run(modules[:length], x)
            modules = modules[length:]
        return x

    def run(self, modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
        """The modules on these inputs, to be computed again in the backward pass if that is asked for."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()) or _are_explained(modules):
            return _apply(modules, *inputs)
        if torch.compiler.is_compiling():  # a compiler sees to the running statistics itself
            return checkpoint(_apply, modules, *inputs, use_reentrant=False)
        return checkpoint(_apply, modules, *inputs, use_reentrant=False, context_fn=partial(_contexts, modules))


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Switch it on or off for all :class:`Blocks` in a model.

    Raises:
        ValueError: It is to be switched on, and the model has none.
    """
    found = [module for module in model.modules() if isinstance(module, Blocks)]
    if enable and not found:
        raise ValueError(
            f"grad_checkpointing: {type(model).__name__} has no blocks to compute again in the backward pass; B-cos "
            "ResNets, DenseNets, ConvNeXts and VGGs, and all SimpleViTs and ViT-Cs, have"
        )
    for blocks in found:
        blocks.grad_checkpointing = enable


def _apply(modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    out = modules[0](*inputs)
    for module in modules[1:]:
        out = module(out)
    return out


def _are_explained(modules: Sequence[nn.Module]) -> bool:
    """What explanation mode holds constant could not be known when a later backward pass computes it again."""
    return any(isinstance(part, Detachable) and part.detach for module in modules for part in module.modules())


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the forward pass, and around computing it again."""
    return nullcontext(), _ScratchBuffers(modules)


class _ScratchBuffers:
    """Let norms update copies of their running statistics: the forward pass has counted this batch already.

    Entered again for each backward pass through the same graph, which a generator's context could not be.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.parts = [part for module in modules for part in module.modules() if part._buffers]

    def __enter__(self) -> None:
        self.kept = [dict(part._buffers) for part in self.parts]
        for part, buffers in zip(self.parts, self.kept, strict=True):
            part._buffers.update({k: None if buffer is None else buffer.clone() for k, buffer in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for part, buffers in zip(self.parts, self.kept, strict=True):
            part._buffers.update(buffers)
