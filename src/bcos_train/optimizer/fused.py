"""Fused steps for torch's optimizers."""

from collections.abc import Callable
from functools import partial

from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["prefer_fused"]

#: Arguments that select an optimizer's implementation.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


def prefer_fused(build: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Return ``build`` with ``fused=True`` where torch supports it; results agree up to rounding.

    Do not combine with a ``GradScaler`` and gradient clipping: a fused step unscales the gradients itself, so that
    clipping before it would act on the scaled ones.

    Args:
        build: ``parameters -> Optimizer``. Only a ``functools.partial`` of Adam, AdamW or SGD that doesn't select an
            implementation is changed.
    """
    if not isinstance(build, partial) or build.func not in (Adam, AdamW, SGD):
        return build
    return build if _IMPLEMENTATION & build.keywords.keys() else partial(build, fused=True)
