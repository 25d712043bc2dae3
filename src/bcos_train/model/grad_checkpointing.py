"""Gradient checkpointing: recompute the activations of blocks in the backward pass, to save memory.

PyTorch calls it activation checkpointing, timm gradient checkpointing (Chen et al. 2016, arXiv 1604.06174). Only the
input of each block is stored, at the cost of one more forward pass of the blocks per training step. The results are
unchanged.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bcos_train.explanation.mode import mode_to_resume

__all__ = ["CheckpointedBlocks", "set_grad_checkpointing"]


class CheckpointedBlocks(nn.Sequential):
    """Sequence of blocks, of one or several modules each, with optional gradient checkpointing.

    Checkpointing takes effect in training mode only.
    """

    # Class attributes, as `Detachable.detach` is.
    grad_checkpointing: bool = False
    #: Number of modules of each block; remaining modules are a block each.
    block_lengths: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return super().forward(x)
        modules, lengths = list(self), list(self.block_lengths)
        while modules:
            length = lengths.pop(0) if lengths else 1
            x = self.run_block(modules[:length], x)
            modules = modules[length:]
        return x

    def run_block(self, modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
        """Apply the modules of a block to the inputs, checkpointed if that is enabled."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return _apply(modules, *inputs)
        if torch.compiler.is_compiling():  # the compiler handles the running statistics itself
            return checkpoint(_apply, modules, *inputs, use_reentrant=False)
        return checkpoint(_apply, modules, *inputs, use_reentrant=False, context_fn=partial(_contexts, modules))


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Enable or disable gradient checkpointing in all :class:`CheckpointedBlocks` of a model.

    Raises:
        ValueError: ``enable`` is True and the model has no blocks.
    """
    all_blocks = [module for module in model.modules() if isinstance(module, CheckpointedBlocks)]
    if enable and not all_blocks:
        raise ValueError(
            f"grad_checkpointing: {type(model).__name__} has no blocks to recompute in the backward pass; B-cos "
            "ResNets, DenseNets, ConvNeXts and VGGs, and all SimpleViTs and ViT-Cs, have"
        )
    for blocks in all_blocks:
        blocks.grad_checkpointing = enable


def _apply(modules: Sequence[nn.Module], *inputs: Tensor) -> Tensor:
    out = modules[0](*inputs)
    for module in modules[1:]:
        out = module(out)
    return out


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of its recomputation."""
    return nullcontext(), _Recomputation(modules)


class _Recomputation:
    """Resume the explanation mode of the forward pass, and let norms update copies of their running statistics.

    Reusable, for several backward passes through one graph, unlike the context manager of a generator.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.resumed_mode = mode_to_resume()

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.resumed_mode())
        self.stack.enter_context(_temporary_buffers(self.modules))

    def __exit__(self, *exc_info: Any) -> None:
        self.stack.__exit__(*exc_info)


@contextmanager
def _temporary_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Replace buffers by copies, so that a batch isn't counted twice."""
    parts = [part for module in modules for part in module.modules() if part._buffers]
    originals = [dict(part._buffers) for part in parts]
    for part, buffers in zip(parts, originals, strict=True):
        part._buffers.update({k: None if buffer is None else buffer.clone() for k, buffer in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in zip(parts, originals, strict=True):
            part._buffers.update(buffers)
