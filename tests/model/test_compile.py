"""No model splits its graph under torch.compile, in training mode."""

from typing import Any

import pytest
import torch

from bcos_train import create_model
from bcos_train.loss import BinaryCrossEntropy

#: One of each family, made shallow, with what it draws at random in training: name, side of the images, options.
MODELS: list[tuple[str, int, dict[str, Any]]] = [
    ("resnet20", 8, {"layers": (1, 1, 2), "stochastic_depth_prob": 0.3, "max_out": 2}),
    ("resnet18", 32, {"layers": (1, 1, 1, 2), "stochastic_depth_prob": 0.3}),
    ("resnet50", 32, {"layers": (1, 1, 1, 2)}),
    ("resnext29_32x4d", 8, {"layers": (1, 1, 1)}),
    ("densenet121", 32, {"drop_rate": 0.3, "block_config": (2, 2)}),
    ("vgg11_bnu", 32, {"layers": (1, 1, 1, 1, 1)}),
    ("convnext_atto", 32, {"layers": (1, 1, 1, 2), "stochastic_depth_prob": 0.3}),
    ("simple_vit_ti_patch16_224", 32, {"depth": 2}),
    ("vitc_ti_patch1_14", 32, {"depth": 2}),
    ("plain_cnn9", 16, {}),
]


@pytest.mark.parametrize(("name", "size", "options"), MODELS, ids=[name for name, *_ in MODELS])
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
