"""Stand-in for `bcos_train.nn.fast` if that folder is missing: all layers compute their definitions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.nn.functional import normalize_weight, statistics_dtype


def no_fast_path(layer: nn.Module, x: Tensor) -> Tensor | None:
    return None


batch_norm_forward = bcos_conv2d_forward = bcos_linear_forward = linear_forward = no_fast_path


def why(layer: nn.Module, x: Tensor) -> str:  # x as in `bcos_train.nn.fast.dispatch.why`
    return "definition: bcos_train.nn.fast is missing"


def prepare_backend(backend: str) -> None:
    pass


def unit_weight(module: Any) -> Tensor:
    return normalize_weight(module.weight)


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), dims, correction=0, keepdim=True)
    return mean, var


@contextlib.contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    yield


@contextlib.contextmanager
def live_weights() -> Iterator[None]:
    yield
