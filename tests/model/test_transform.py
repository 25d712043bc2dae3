"""Inference transforms of models."""

import numpy as np
import pytest
import torch
from bcos.data.presets import CIFAR10ClassificationPresetTest, ImageNetClassificationPresetEval
from PIL import Image

from bcos_train import create_model


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("resnet18", ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)),
        ("standard_resnet18", ImageNetClassificationPresetEval(crop_size=224)),
        ("resnet20", CIFAR10ClassificationPresetTest(is_bcos=True)),
    ],
)
def test_equals_the_official_preset(name: str, official: object) -> None:
    size = (32, 32, 3) if name == "resnet20" else (260, 333, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    ours = create_model(name).transform(image)  # type: ignore[operator]
    assert torch.equal(ours, official(image))  # type: ignore[operator]


def test_takes_any_image_mode() -> None:
    transform = create_model("resnet20").transform
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert transform(Image.new(mode, (32, 32))).shape == (6, 32, 32)  # type: ignore[operator]


def test_three_channels_are_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"takes one image \(1, 6, H, W\), got \(1, 3, 32, 32\): .*model\.transform"):
        create_model("resnet20").eval().explain(torch.rand(1, 3, 32, 32))  # type: ignore[operator]
