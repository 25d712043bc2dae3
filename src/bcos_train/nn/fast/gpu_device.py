"""Decide which tensors take the GPU's code path, and whether Triton can be used there."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["GPU_TYPES", "TRITON_DTYPES", "has_triton", "is_on_gpu", "uses_triton"]

#: Device types that use the GPU kernels. Tests and tools add "meta" to trace them without a GPU.
GPU_TYPES = {"cuda"}
#: The dtypes of the Triton kernels, which all compute in float32.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_on_gpu(x: Tensor) -> bool:
    """True if ``x`` takes the GPU's code path."""
    return x.device.type in GPU_TYPES


def uses_triton(x: Tensor) -> bool:
    """True if ``x`` is on a GPU and the Triton kernels take its dtype."""
    return is_on_gpu(x) and x.dtype in TRITON_DTYPES and (x.device.type != "cuda" or has_triton(x.get_device()))


@cache
def has_triton(index: int) -> bool:
    """True if Triton runs on CUDA device ``index``; the first call compiles and runs a small kernel to find out.

    Warns:
        RuntimeWarning: Triton is installed but does not work, for example because there is no C compiler.
    """
    if find_spec("triton") is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        from bcos_train.nn.fast.triton_kernels import check_device

        check_device(torch.device("cuda", index))
    # Triton raises many types of errors, and the eager operations always work.
    except Exception as error:
        warnings.warn(
            f"Triton does not work on cuda:{index}; B-cos layers use slower eager operations there: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
