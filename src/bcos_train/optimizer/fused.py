"""torch's optimizers in one pass over the weights."""

from collections.abc import Callable
from functools import partial

from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["prefer_fused"]

#: Arguments that choose how an optimizer computes.
_CHOICES = {"foreach", "fused", "capturable", "differentiable"}


def prefer_fused(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """``make`` with torch's fused step where it has one and nothing was chosen; the same numbers to rounding.

    Not to be used together with a ``GradScaler`` and gradient clipping: a fused step divides the gradients by the scale
    itself, so that what is clipped before it would be the scaled ones.

    Args:
        make: ``parameters -> Optimizer``; ``functools.partial`` of Adam, AdamW or SGD is changed, all else is returned
            as it is.
    """
    if not isinstance(make, partial) or make.func not in (Adam, AdamW, SGD) or _CHOICES & make.keywords.keys():
        return make
    return partial(make, fused=True)
