"""In-place sums of residual blocks."""

import torch
from torch import Tensor, nn

from bcos_train.nn.fast.dispatch import has_hooks, is_folded, is_traced_or_transformed

__all__ = ["add_shortcut"]


def add_shortcut(branch: Tensor, shortcut: Tensor, *last: nn.Module) -> Tensor:
    """branch + shortcut, written into ``branch`` where nothing else needs its values.

    On a CPU that takes a quarter of the time: a new large tensor costs more than a pass over an existing one.

    Args:
        branch, shortcut: Tensors of the same shape.
        last: The modules that computed ``branch``, in order; at least one.

    Third-party modules may retain their output or return their input: after those the sum is a new tensor.
    """
    if branch.dtype != shortcut.dtype or is_traced_or_transformed() or not _is_free(branch, last):
        return branch + shortcut
    return branch.add_(shortcut)


def _is_free(out: Tensor, last: tuple[nn.Module, ...]) -> bool:
    """True if no module, hook or autograd node retains these values."""
    # Imported here because these modules import the seam, which imports this one.
    from bcos_train.nn.detachable import Detachable
    from bcos_train.nn.layer import BcosLayer
    from bcos_train.nn.norm import Norm2d

    computes = any(isinstance(module, BcosLayer | Norm2d) for module in last)  # the others may return their input
    if not computes or not all(_is_known(part) and not has_hooks(part) for m in last for part in m.modules()):
        return False
    if not (torch.is_grad_enabled() and out.requires_grad):
        return True
    if is_folded(last[-1]):
        # Its input is the output of a B-cos layer, which in explanation mode retains only its scale.
        return all(part.detach for part in last if isinstance(part, Detachable))
    return isinstance(last[-1], Norm2d)  # none of them retains its output


def _is_known(module: nn.Module) -> bool:
    """True if its ``forward`` is known to retain nothing."""
    known = ("bcos_train.nn.", "torch.nn.modules.", "torchvision.ops.")
    return type(module).__module__.startswith(known) and "forward" not in vars(module)
