"""torch's fused optimizers against its unfused ones."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from bcos_train.optimizer import prefer_fused

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"lr": 1e-2}),
    "SGD": (SGD, {"lr": 1e-2, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_weights(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    weights = []
    for make in (partial(kind, **options, foreach=False), prefer_fused(partial(kind, **options))):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        optimizer = make(model.parameters())
        assert bool(optimizer.param_groups[0]["fused"]) == (len(weights) == 1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make",
    [partial(RMSprop, lr=1), partial(Adam, foreach=True), partial(SGD, fused=False), lambda p: SGD(p, lr=1)],
    ids=["RMSprop", "foreach", "not fused", "function"],
)
def test_others_stay(make: Any) -> None:
    assert prefer_fused(make) is make
