"""Compute in full float32."""

import threading
from collections.abc import Callable, Iterator
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


class _Blocks:
    """The active blocks of `without_tf32` in all threads: PyTorch's setting is global."""

    lock = threading.Lock()
    count = 0
    restore: Callable[[], None]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 within the block, and restore the previous settings afterwards.

    W(x) x equals the logit to 1e-6 in float32, but only to 1e-3 in TF32. The setting holds for all threads of the
    process, until the last of several blocks ends. Also usable as a decorator: ``@without_tf32()``.
    """
    with _Blocks.lock:
        if _Blocks.count == 0:
            _Blocks.restore = _forbid_tf32()
        _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= 1
            if _Blocks.count == 0:
                _Blocks.restore()


def _forbid_tf32() -> Callable[[], None]:
    """Disable TF32, and return the function that restores the previous settings."""
    backends: Any = torch.backends  # its stubs lack fp32_precision
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    previous = {part: part.fp32_precision for part in (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)}
    precision = "highest"
    with suppress(RuntimeError):  # the newer interface was used: nothing to restore in the older one
        precision = torch.get_float32_matmul_precision()

    def restore() -> None:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = previous[cudnn.conv] == "tf32"
        for part, value in previous.items():
            part.fp32_precision = value

    try:
        allow_tf32(False)
        for part in previous:
            part.fp32_precision = "ieee"  # not "none", which inherits the setting for all backends
    except BaseException:
        restore()
        raise
    return restore
