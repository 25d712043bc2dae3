"""Weights to write, to read and to compare."""

from typing import Any

import torch
from torch import Tensor, nn

from bcos_train import create_model

State = dict[str, Tensor]


def random_state(name: str, seed: int = 7, **options: Any) -> State:
    torch.manual_seed(seed)
    return dict(create_model(name, **options).state_dict())


def seeded(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **options)


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
