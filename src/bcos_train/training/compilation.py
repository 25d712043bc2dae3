"""Compile the network of a training step, in blocks where that makes the first step come sooner."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.training.options import TrainerOptions
from bcos_train.utils.compiling import missing_for_compiling, prepare_to_compile

#: On CUDA, networks with at least so many parameters are compiled by default. A smaller one (ResNet-20 has 0.5 million)
#: gains from it too, but its runs may be shorter than the compilation.
COMPILE_FROM_PARAMETERS = 1_000_000


def should_compile(options: TrainerOptions, model: nn.Module) -> bool:
    """Whether a run compiles its network: what ``trainer.compile`` says, or its default for this machine and network.

    Prepares PyTorch for it; see :func:`~bcos_train.utils.compiling.prepare_to_compile`.

    Raises:
        ValueError: It is asked for and something is missing. As a mere default it is then left out.
    """
    if options.compile is not None:
        if options.compile:
            prepare_to_compile("trainer.compile=true", cuda=options.uses_cuda)
        return options.compile
    size = sum(p.numel() for p in model.parameters())
    if not options.uses_cuda or size < COMPILE_FROM_PARAMETERS or missing_for_compiling(cuda=True):
        return False
    prepare_to_compile("trainer.compile=null", cuda=True)
    return True


def parts_to_compile(model: nn.Module) -> list[nn.Module]:
    """The modules of which each becomes a graph of its own: blocks that repeat and what lies around them, or the model.

    Equal blocks share one compiled graph (in a ResNet-50 there are 8 different ones among 16), so that far less has to
    be compiled; only what could be fused across the end of a block is lost. Without repetition (DenseNet, VGG) the
    whole model is compiled, and so it is where blocks are computed again in the backward pass, which has to run the
    same code as the forward pass.
    """
    sequences = [module for module in model.modules() if isinstance(module, CheckpointedBlocks)]
    blocks = [block for sequence in sequences for block in sequence]
    kinds = {repr(block) for block in blocks}
    if not blocks or 2 * len(kinds) > len(blocks) or any(sequence.grad_checkpointing for sequence in sequences):
        return [model]
    return list(_around(model, set(blocks)))


def _around(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """The blocks, and the largest modules with parameters that contain none of them."""
    for child in module.children():
        if child in blocks or (blocks.isdisjoint(child.modules()) and any(True for _ in child.parameters())):
            yield child
        else:
            yield from _around(child, blocks)


class CompiledNetwork:
    """Calls ``model`` compiled, and leaves it uncompiled for everybody else.

    Validation and explanations would otherwise have it compiled again for each of their modes. The model's modules and
    keys are unchanged.

    The graphs are static. A batch that is smaller than one before it, such as the last one of an epoch, runs
    uncompiled: a graph of its own would cost another compilation for one step in each epoch, and with a dynamic graph,
    PyTorch's default, all later batches would run that slower one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = parts_to_compile(model)
        # What `nn.Module.compile` sets, here only for the time of a call.
        self._compiled = [torch.compile(_caller(part), dynamic=False) for part in self.parts]
        self._full_batch = 0
        config = torch._dynamo.config
        # Each kind of block is a graph of the same `forward`, of which 8 are allowed by default.
        config.recompile_limit = max(config.recompile_limit, 2 * len(self.parts))
        if len(self.parts) > 1:
            # DDP's reductions start whenever the backward pass of a block ends; smaller graphs would gain nothing.
            config.optimize_ddp = False

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, K)``."""
        self._full_batch = max(self._full_batch, len(x))
        if len(x) < self._full_batch:
            return self.model(x)
        try:
            for part, compiled in zip(self.parts, self._compiled, strict=True):
                part._compiled_call_impl = compiled
            return self.model(x)
        finally:
            for part in self.parts:
                part._compiled_call_impl = None

    def __str__(self) -> str:
        return "as a whole" if self.parts == [self.model] else f"block by block, {len(self.parts)} parts"


def _caller(part: nn.Module) -> Callable[..., Any]:
    """The uncompiled call as a function of ours: PyTorch 2.11 compiles none of its own, such as a Sequential's."""

    def call(*args: Any) -> Any:
        return part._call_impl(*args)

    return call
