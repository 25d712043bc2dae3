"""Interface between the definitions in this package and the faster code in `bcos_train.nn.fast`.

A layer calls a function of ``fast`` for its output, and computes its definition if that returns None; the conditions
are in `bcos_train.nn.fast.dispatch`. Without the folder ``fast`` the functions always return None: the results are the
same, but slower.
"""

from importlib.util import find_spec
from typing import Literal, get_args

from torch import nn

from bcos_train.utils.suggestions import suggest

if find_spec("bcos_train.nn.fast") is None:  # not `except ImportError`, which would hide faults of the package
    from bcos_train.nn import without_fast as fast
else:
    from bcos_train.nn import fast  # type: ignore[no-redef]

__all__ = ["BACKENDS", "Accelerated", "Backend", "fast", "set_backend"]

Backend = Literal["fused", "compiled", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Accelerated(nn.Module):
    """A module with a faster equivalent in `bcos_train.nn.fast`."""

    # A class attribute, as `Detachable.detach` is.
    backend: Backend = "fused"


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Choose how all layers of a model compute.

    Args:
        backend: ``"fused"`` (operations with hand-written derivatives, on a GPU with Triton kernels; the default),
            ``"compiled"`` (their elementwise passes compiled by `torch.compile` at the first steps), or
            ``"reference"`` (the definitions).

    Raises:
        ValueError: Unknown name, or no compiler for ``"compiled"``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}{suggest(str(backend), BACKENDS)}: one of {', '.join(BACKENDS)}")
    fast.prepare_backend(backend)
    for module in model.modules():
        if isinstance(module, Accelerated):
            module.backend = backend
