"""Fixtures of the metric tests."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Assert that the block doesn't change the model or the random state."""
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    yield
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    return _untouched
