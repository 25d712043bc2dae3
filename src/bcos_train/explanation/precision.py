"""Compute in full float32 on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["allow_tf32", "without_tf32"]


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 (10-bit mantissas) in float32 convolutions and matrix products on CUDA.

    By default, PyTorch allows it for convolutions only. Other devices are not affected.
    """
    # PyTorch's older interface, which also sets the newer one. Reading the interface that was not set raises an
    # exception, and Lightning and torch.compile each read a different one.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 within the block, and restore the previous settings afterwards.

    W(x) x equals the logit to 1e-6 in float32, but only to 1e-3 in TF32. The setting holds for all threads of the
    process. Blocks can be nested. Also usable as a decorator: ``@without_tf32()``.
    """
    backends: Any = torch.backends  # its stubs lack fp32_precision
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    previous = {part: part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)}
    precision = "highest"
    with suppress(RuntimeError):  # the newer interface was used: nothing to restore in the older one
        precision = torch.get_float32_matmul_precision()
    try:
        allow_tf32(False)
        for part in (matmul, cudnn.conv, cudnn.rnn):
            part.fp32_precision = "ieee"  # not "none", which inherits the setting for all backends
        yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = previous[cudnn.conv] == "tf32"
        for part, value in previous.items():
            part.fp32_precision = value
