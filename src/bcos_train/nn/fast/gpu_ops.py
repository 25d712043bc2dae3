"""The Triton kernels as operations ``bcos_train::...`` of torch's dispatcher.

Tracers and counters then see one operation per launch, and shapes are known on the meta device. They are defined with
`torch.library.Library`, since a call of a `torch.library.custom_op` takes several times as long. The first call imports
Triton.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

__all__ = ["FEATURE_NORM", "OPS", "PATCH_NORM", "SQUARES", "window_shape"]

#: What `sum_of_squares` returns: the sum itself, sqrt(sum + 1e-6), or sqrt(sum) + 1e-12, with 1 where the sum is 0.
SQUARES, PATCH_NORM, FEATURE_NORM = 0, 1, 2


def window_shape(squares: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> list[int]:
    """Return the shape of the output of a window over (N, 1, H, W)."""
    windows = zip(squares.shape[2:], kernel_size, stride, padding, strict=True)
    return [len(squares), 1, *((size + 2 * p - k) // s + 1 for size, k, s, p in windows)]


def _meta_nothing(*_: object) -> None:
    return None


def _meta_sum_of_squares(x: Tensor, sizes: list[int], rows: bool, kind: int, shape: list[int]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _meta_window_norm(squares: Tensor, *window: list[int]) -> Tensor:
    return squares.new_empty(window_shape(squares, *window))


def _meta_square_backward(grad: Tensor, kept: Tensor, norm: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(kept), torch.empty_like(norm)


def _meta_batch_norm_constants(var: Tensor, eps: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(var), torch.empty_like(var), var.new_empty(1, dtype=torch.int32)


def _meta_normalize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), weight.new_empty(len(weight), dtype=torch.float32)


def _meta_normalize_backward(grad: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    return torch.empty_like(weight)


_OPERATIONS: dict[str, Callable[..., object]] = {
    "sum_of_squares(Tensor x, int[] sizes, bool rows, int kind, int[] shape) -> Tensor": _meta_sum_of_squares,
    "window_norm(Tensor squares, int[] kernel_size, int[] stride, int[] padding) -> Tensor": _meta_window_norm,
    "square_(Tensor(a!) out, Tensor norm, int[] sizes, bool rows) -> ()": _meta_nothing,
    "square_backward(Tensor grad, Tensor kept, Tensor norm, int[] sizes, bool rows, bool kept_out)"
    " -> (Tensor, Tensor)": _meta_square_backward,
    "add_product_(Tensor(a!) a, Tensor x, Tensor s, int[] sizes, bool rows) -> ()": _meta_nothing,
    "batch_norm_constants(Tensor var, float eps, int count) -> (Tensor, Tensor, Tensor)": _meta_batch_norm_constants,
    "normalize(Tensor weight, ScalarType dtype) -> (Tensor, Tensor)": _meta_normalize,
    "normalize_backward(Tensor grad, Tensor weight, Tensor norm) -> Tensor": _meta_normalize_backward,
}


def _launch(name: str) -> Callable[..., object]:
    def call(*args: object) -> object:
        return getattr(import_module("bcos_train.nn.fast.triton_kernels"), name)(*args)

    return call


_LIBRARY = torch.library.Library("bcos_train", "DEF")
for _schema, _meta in _OPERATIONS.items():
    _name = _LIBRARY.define(_schema)
    # On a CPU too, for Triton's interpreter.
    _LIBRARY.impl(_name, _launch(_name), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _meta, "Meta")

#: The operations; calling their `default` overload is the fastest.
OPS = torch.ops.bcos_train
