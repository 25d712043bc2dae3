"""Names of our models in timm, and test models and images."""

from typing import Any

import timm
import torch
from torch import Tensor

import bcos_train.timm  # noqa: F401 - registers the models
from bcos_train import list_models
from bcos_train.weights.records import timm_name

ALL = {own: name for name in list_models() if (own := timm_name(name)) is not None}


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **options)
