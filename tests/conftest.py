"""Settings of all tests."""

import pytest
import torch

from bcos_train.model import create_model
from bcos_train.nn import BACKENDS
from bcos_train.nn.backend import Accelerated

# Small tensors gain nothing from threads, and threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, default="fused", help="of the layers, where a test chooses none")


def pytest_configure(config: pytest.Config) -> None:
    backend = config.getoption("--backend")
    Accelerated.backend = backend
    assert create_model.__kwdefaults__ is not None
    create_model.__kwdefaults__["backend"] = backend
