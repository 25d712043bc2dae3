"""How the layers compute: with fused operations, compiled ones, or the plain ones that define them."""

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from bcos_train.compiling import prepare_to_compile
from bcos_train.nn.kernels import EAGER, Kernels, compiled_kernels
from bcos_train.suggest import suggest

__all__ = ["BACKENDS", "Backend", "Fusable", "is_hooked", "is_plain", "set_backend"]

Backend = Literal["fused", "compiled", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Fusable(nn.Module):
    """A module that has a fused operation beside its plain ones.

    Where the fused one doesn't apply the plain ones take over: within `torch.compile` and `torch.export`, which fuse
    for themselves, under `torch.func` transforms, and in forward-mode differentiation.
    """

    # A class attribute, as `Detachable.detach` is.
    backend: Backend = "fused"

    def fused_kernels(self) -> Kernels | None:
        """What the fused operation is to use, or None for the plain operations."""
        if self.backend == "reference" or is_plain():
            return None
        return compiled_kernels() if self.backend == "compiled" else EAGER


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Choose how all layers of a model compute.

    Args:
        backend: "fused" (operations with derivatives by hand; the default), "compiled" (their elementwise passes
            compiled by `torch.compile`, at the first steps), or "reference" (plain operations).

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


def is_plain() -> bool:
    """Whether only plain operations will do: they are being traced, transformed, or differentiated forwards."""
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or is_transformed


def is_hooked(module: Any) -> bool:
    """Whether somebody waits for a call of this module, or of any."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())
