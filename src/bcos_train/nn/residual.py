"""The sum at the end of a residual block."""

import torch
from torch import Tensor, nn

from bcos_train.nn.detachable import Detachable
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.norm import BatchNormUncentered2d, Norm2d
from bcos_train.nn.observers import is_hooked, is_plain

__all__ = ["add_shortcut"]


def add_shortcut(branch: Tensor, shortcut: Tensor, *last: nn.Module) -> Tensor:
    """branch + shortcut, written into `branch` where nobody needs its values any more.

    On a CPU that takes a quarter of the time: a fresh large tensor costs more than a pass over an old one.

    Args:
        branch, shortcut: of the same shape.
        last: the modules through which the values of `branch` came, in their order; at least one.

    Modules of other making may keep what they give, or hand on what they get: after those it is a new tensor.
    """
    if branch.dtype != shortcut.dtype or is_plain() or not _is_free(branch, last):
        return branch + shortcut
    return branch.add_(shortcut)


def _is_free(out: Tensor, last: tuple[nn.Module, ...]) -> bool:
    """Whether these values are the branch's own, and neither a module, a hook nor autograd keeps them."""
    makes = any(isinstance(module, BcosLayer | Norm2d) for module in last)  # the others may hand on their input
    if not makes or not all(_is_known(part) and not is_hooked(part) for module in last for part in module.modules()):
        return False
    if not (torch.is_grad_enabled() and out.requires_grad):
        return True
    norm = last[-1]
    if isinstance(norm, BatchNormUncentered2d) and norm.is_folded:
        # It passes on the output of a B-cos layer, which in explanation mode keeps its scale alone.
        return all(part.detach for part in last if isinstance(part, Detachable))
    return isinstance(norm, Norm2d)  # none of them keeps its output


def _is_known(module: nn.Module) -> bool:
    """Whether its `forward` is one that remembers nothing."""
    known = ("bcos_train.nn.", "torch.nn.modules.", "torchvision.ops.")
    return type(module).__module__.startswith(known) and "forward" not in vars(module)
