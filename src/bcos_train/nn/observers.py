"""Who else has to do with what is being computed: tracers, transforms, modes and hooks."""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["has_mode", "is_hooked", "is_plain"]


def is_plain() -> bool:
    """Whether only plain operations will do: they are being traced, transformed, or differentiated forwards."""
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or is_transformed


def is_hooked(module: Any) -> bool:
    """Whether somebody waits for a call of this module, or of any."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())


def has_mode() -> bool:
    """Whether a mode sees each operation: one that counts them, or that puts other tensors in the place of torch's."""
    return torch._C._len_torch_dispatch_stack() > 0
