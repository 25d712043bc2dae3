"""Memory that stays between calls."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bcos_train.nn import BcosConv2d


@pytest.mark.parametrize("context", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake tensors", "meta device"])
def test_nothing_outlives_a_mode(context: Any) -> None:
    """In a thread of its own, which has nothing yet that layers keep between calls."""
    layer, x = BcosConv2d(3, 4, 3), torch.randn(2, 3, 5, 5)

    def outputs() -> tuple[Tensor, Tensor]:
        for make in (lambda: layer, lambda: BcosConv2d(3, 4, 3)):  # one of them fits, the other is from elsewhere
            with context(), contextlib.suppress(AssertionError, RuntimeError):
                make()(torch.rand(2, 3, 5, 5, device="cpu"))
        with torch.no_grad():
            return layer(x), BcosConv2d(3, 4, 3)(x)

    with ThreadPoolExecutor(1) as pool:
        found, _ = pool.submit(outputs).result()
    torch.testing.assert_close(found, layer(x).detach())
