"""Compile the network of a training step, block by block where this shortens the compilation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.task import Network
from bcos_train.training.options import TrainerOptions
from bcos_train.utils.compiling import missing_for_compiling, prepare_to_compile

#: On CUDA, networks with at least this number of parameters are compiled by default. Smaller ones (ResNet-20 has 0.5
#: million) also become faster, but their runs may be shorter than the compilation.
MIN_PARAMETERS_TO_COMPILE = 1_000_000


def should_compile(options: TrainerOptions, model: nn.Module) -> bool:
    """Return ``trainer.compile`` or its default for this machine and network, and prepare PyTorch for compilation.

    See :func:`~bcos_train.utils.compiling.prepare_to_compile`.

    Raises:
        ValueError: ``trainer.compile=true``, and something is missing. The default is False then.
    """
    if options.compile is not None:
        if options.compile:
            prepare_to_compile("trainer.compile=true", cuda=options.uses_cuda)
        return options.compile
    size = sum(p.numel() for p in model.parameters())
    if not options.uses_cuda or size < MIN_PARAMETERS_TO_COMPILE or missing_for_compiling(cuda=True):
        return False
    prepare_to_compile("trainer.compile=null", cuda=True)
    return True


def parts_to_compile(model: nn.Module) -> list[nn.Module]:
    """Return the modules to compile separately: repeated blocks and the modules around them, or the whole model.

    Equal blocks share a compiled graph (a ResNet-50 has 8 different ones among 16), so that much less is compiled; only
    fusion across blocks is lost. The whole model is compiled if blocks aren't repeated (DenseNet, VGG), or with
    gradient checkpointing, whose recomputation has to run the same code as the forward pass.
    """
    sequences = [module for module in model.modules() if isinstance(module, CheckpointedBlocks)]
    blocks = [block for sequence in sequences for block in sequence]
    kinds = {repr(block) for block in blocks}
    if not blocks or 2 * len(kinds) > len(blocks) or any(sequence.grad_checkpointing for sequence in sequences):
        return [model]
    return list(_around(model, set(blocks)))


def _around(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the blocks, and the largest modules with parameters that contain none of them."""
    for child in module.children():
        if child in blocks or (blocks.isdisjoint(child.modules()) and any(True for _ in child.parameters())):
            yield child
        else:
            yield from _around(child, blocks)


class CompiledNetwork(Network):
    """Calls a compiled ``model``, which remains uncompiled for all other callers.

    Otherwise validation and explanations would compile it again for each of their modes. The model's modules and keys
    are unchanged.

    The graphs are static. A batch of another size than ``batch_size``, such as the last of an epoch, runs uncompiled: a
    second graph would be compiled for one step per epoch, and with a dynamic graph, PyTorch's default, all later
    batches would run this slower one. Which batches are compiled depends on their size alone, so that a resumed run
    computes the same as an uninterrupted one.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__(model)
        self.batch_size = batch_size
        self.parts = parts_to_compile(model)
        # Values of the attribute that `nn.Module.compile` sets; here it is set only during a call.
        self._compiled = [torch.compile(_call_function(part), dynamic=False) for part in self.parts]
        config = torch._dynamo.config
        # Each type of block is a graph of the same `forward`, of which PyTorch compiles 8 by default.
        config.recompile_limit = max(config.recompile_limit, 2 * len(self.parts))
        if len(self.parts) > 1:
            # DDP's reductions start when the backward pass of a block ends; smaller graphs have no advantage.
            config.optimize_ddp = False

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, K)``."""
        if len(x) != self.batch_size:
            return super().__call__(x)
        try:
            for part, compiled in zip(self.parts, self._compiled, strict=True):
                part._compiled_call_impl = compiled
            return super().__call__(x)
        finally:
            for part in self.parts:
                part._compiled_call_impl = None

    def __str__(self) -> str:
        return "as a whole" if self.parts == [self.model] else f"block by block, {len(self.parts)} parts"


def _call_function(part: nn.Module) -> Callable[..., object]:
    """Wrap the uncompiled call in a function: PyTorch 2.11 doesn't compile functions of torch, such as Sequential's."""

    def call(*args: object) -> object:
        return part._call_impl(*args)

    return call
