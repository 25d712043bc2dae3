"""Inference transforms of models."""

from typing import Any

import numpy as np
import pytest
import torch
from bcos.data.presets import CIFAR10ClassificationPresetTest, ImageNetClassificationPresetEval
from PIL import Image
from torchvision.transforms import ConvertImageDtype, PILToTensor

from bcos_train import create_model

PRESETS = pytest.mark.parametrize(
    ("name", "official"),
    [
        ("resnet18", ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)),
        ("standard_resnet18", ImageNetClassificationPresetEval(crop_size=224)),
        ("resnet20", CIFAR10ClassificationPresetTest(is_bcos=True)),
    ],
)


@PRESETS
def test_equals_the_official_preset(name: str, official: object) -> None:
    size = (32, 32, 3) if name == "resnet20" else (260, 333, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    ours = create_model(name).transform(image)  # type: ignore[operator]
    assert torch.equal(ours, official(image))  # type: ignore[operator]


@PRESETS
def test_steps_equal_those_of_the_official_preset(name: str, official: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (260, 333, 3), dtype=np.uint8))
    transform: Any = create_model(name).transform
    assert torch.equal(transform.transforms(image), transform(image))
    ours, theirs = transform.transforms.transforms, official.transforms.transforms
    if name == "resnet20":  # ToTensor in one step is PILToTensor and ConvertImageDtype
        theirs = [PILToTensor(), ConvertImageDtype(torch.float32), *theirs[1:]]
    x, y = image, image
    for step, reference in zip(ours, theirs, strict=True):
        x, y = step(x), reference(y)
        assert np.array_equal(np.asarray(x), np.asarray(y)), f"{step} is not {reference}"


@pytest.mark.parametrize("image", [torch.zeros(3, 32, 32), np.zeros((32, 32, 3), np.uint8), "cat.jpg"])
def test_other_things_than_images_are_told_how_to_convert_them(image: object) -> None:
    with pytest.raises(TypeError, match=rf"takes a PIL image, got {type(image).__name__}: .*to_pil_image"):
        create_model("resnet20").transform(image)  # type: ignore[operator]


def test_takes_any_image_mode() -> None:
    transform = create_model("resnet20").transform
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert transform(Image.new(mode, (32, 32))).shape == (6, 32, 32)  # type: ignore[operator]


def test_three_channels_are_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"takes one image \(1, 6, H, W\), got \(1, 3, 32, 32\): .*model\.transform"):
        create_model("resnet20").eval().explain(torch.rand(1, 3, 32, 32))  # type: ignore[operator]
