"""Compute in full float32 on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["allow_tf32", "without_tf32"]


def allow_tf32(allowed: bool) -> None:
    """Allow float32 convolutions and matrix products on CUDA to round their factors to TF32 (10 bits), or forbid it.

    PyTorch's own default is a mixture: convolutions may, matrix products may not. Other devices are not affected.
    """
    # The older of PyTorch's two interfaces sets both. Whoever reads the other one than was set gets an exception, and
    # Lightning and torch.compile read one each.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute in full float32 inside, and as before afterwards.

    W(x) x equals the logit to 1e-6 in float32, but only to 1e-3 in TF32. For all threads of the process; blocks nest.
    Also usable as a decorator: ``@without_tf32()``.
    """
    backends: Any = torch.backends
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    before = {part: part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)}
    precision = "highest"
    with suppress(RuntimeError):  # the newer interface has been used, so there is nothing to restore in the older one
        precision = torch.get_float32_matmul_precision()
    try:
        allow_tf32(False)
        for part in (matmul, cudnn.conv, cudnn.rnn):
            part.fp32_precision = "ieee"  # not "none", which inherits what may be set for all backends
        yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = before[cudnn.conv] == "tf32"
        for part, value in before.items():
            part.fp32_precision = value
