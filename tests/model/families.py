"""One small network of each family."""

from typing import Any

__all__ = ["FAMILIES"]

#: One of each family, made shallow, with what it draws at random in training: name, side of the images, options.
FAMILIES: list[tuple[str, int, dict[str, Any]]] = [
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
