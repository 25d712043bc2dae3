"""Memory for what is needed no longer than a few passes.

On a CPU a fresh large tensor costs more than several passes over an old one, since the system maps and clears its
pages first. So intermediate values go, part by part, through a small tensor that stays, one for each thread and dtype.
On other devices torch keeps such memory itself.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["has_dispatch_mode", "inner_products", "parts"]

#: Elements of a part, unless a single row has more: 4 MiB in float32, what a processor's caches hold.
PART = 2**20


def has_dispatch_mode() -> bool:
    """True if a dispatch mode sees each operation: one that counts them, or replaces tensors by its own."""
    return torch._C._len_torch_dispatch_stack() > 0


class _Memory(threading.local):
    def __init__(self) -> None:
        self.of_dtype: dict[torch.dtype, Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the shape, strides and dtype of `x`, which is dense; its values are arbitrary."""
        memory = self.of_dtype.get(x.dtype)
        if memory is None or len(memory) < x.numel():
            with torch.inference_mode(False):  # what is made in inference mode could not be written outside
                memory = torch.empty(max(x.numel(), PART), dtype=x.dtype, device=x.device)
            self.of_dtype[x.dtype] = memory
        return memory.as_strided(x.shape, x.stride())


_MEMORY = _Memory()


def parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts along the first axis of dense tensors of that length: of `x`, of the others, and scratch like that of `x`.

    The scratch tensor holds arbitrary values, and is the next part's too.
    """
    if (
        x.device.type != "cpu" or x.dim() < 2 or has_dispatch_mode()
    ):  # what a mode puts in a tensor's place may not outlive it
        yield x, *others, torch.empty_like(x)
        return
    if x.numel() <= PART:
        yield x, *others, _MEMORY.like(x)
        return
    rows = max(1, PART * len(x) // x.numel())
    for part, *rest in zip(x.split(rows), *(other.split(rows) for other in others), strict=True):
        yield part, *rest, _MEMORY.like(part)


def inner_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner product of each row of two matrices, (R, K), (R, K) -> (R,), summed in `dtype`."""
    sums = [torch.mul(x, y, out=scratch).sum(1, dtype=dtype) for x, y, scratch in parts(a, b)]
    return torch.cat(sums)
