"""How the layers compute: with fused operations, compiled ones, or the plain ones that define them."""

from typing import Literal, get_args

from torch import Tensor, nn

from bcos_train.compiling import prepare_to_compile
from bcos_train.nn.gpu.device import uses_triton
from bcos_train.nn.gpu.layer_kernels import GPU
from bcos_train.nn.kernels import EAGER, Kernels, compiled_kernels
from bcos_train.nn.observers import is_plain
from bcos_train.suggest import suggest

__all__ = ["BACKENDS", "Backend", "Fusable", "set_backend"]

Backend = Literal["fused", "compiled", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Fusable(nn.Module):
    """A module that has a fused operation beside its plain ones.

    Where the fused one doesn't apply the plain ones take over: within `torch.compile` and `torch.export`, which fuse
    for themselves, under `torch.func` transforms, and in forward-mode differentiation.
    """

    # A class attribute, as `Detachable.detach` is.
    backend: Backend = "fused"

    def fused_kernels(self, x: Tensor) -> Kernels | None:
        """What the fused operation is to use for the input `x`, or None for the plain operations."""
        if self.backend == "reference" or is_plain():
            return None
        if self.backend == "compiled":
            return compiled_kernels()
        return GPU if uses_triton(x) else EAGER


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Choose how all layers of a model compute.

    Args:
        backend: "fused" (operations with derivatives by hand, on a GPU with Triton kernels; the default), "compiled"
            (their elementwise passes compiled by `torch.compile`, at the first steps), or "reference" (plain
            operations).

    Raises:
        ValueError: another name, or no compiler for "compiled".
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}{suggest(str(backend), BACKENDS)}: one of {', '.join(BACKENDS)}")
    if backend == "compiled":
        prepare_to_compile('backend="compiled"')
    for module in model.modules():
        if isinstance(module, Fusable):
            module.backend = backend
