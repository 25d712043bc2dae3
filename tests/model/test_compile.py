"""No model splits its graph under torch.compile, in training mode."""

from typing import Any

import pytest
import torch
from families import FAMILIES

from bcos_train import create_model
from bcos_train.loss import BinaryCrossEntropy


@pytest.mark.parametrize(("name", "size", "options"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_one_graph(name: str, size: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options).double().train()
    loss = BinaryCrossEntropy()
    x, target = torch.rand(2, 6, size, size, dtype=torch.float64), torch.tensor([0, 3])

    def step(images: torch.Tensor) -> torch.Tensor:
        return loss(model(images), target)

    torch.manual_seed(1)
    expected = step(x)
    torch.manual_seed(1)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-9, atol=1e-9)
