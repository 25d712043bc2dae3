"""Preprocessing goes into a file and comes back as the same transform."""

import json
from typing import Any

import pytest
import torch
from PIL import Image

from bcos_train import create_model
from bcos_train.model.preprocessing import Preprocessing

BCOS = {"_target_": "bcos_train.dataset.BcosEncoding"}


def image() -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((300, 270), 90) for _ in range(3)])


@pytest.mark.parametrize("name", ["resnet18", "resnet50_long", "resnet20", "standard_resnet18"])
def test_round_trip(name: str) -> None:
    transform: Any = create_model(name).transform
    found = Preprocessing.from_transform(transform)
    assert found is not None
    again = Preprocessing.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    picture = image()
    assert torch.equal(again.transform()(picture), transform(picture))


@pytest.mark.parametrize(
    ("node", "size", "sentence"),
    [
        ({"_target_": "bcos_train.augmentation.plain"}, (270, 300), "Keep the image's size"),
        ({"_target_": "bcos_train.augmentation.plain", "size": 48}, (48, 48), "Resize to 48 x 48 pixels (bilinear"),
        (
            {"_target_": "bcos_train.augmentation.imagenet_eval", "resize_size": 72, "interpolation": "bicubic"},
            (224, 224),
            "Resize the shorter side to 72 pixels (bicubic, antialiased), crop the central 224 x 224 pixels",
        ),
    ],
    ids=["own size", "square", "crop"],
)
def test_from_config(node: dict[str, Any], size: tuple[int, int], sentence: str) -> None:
    found = Preprocessing.from_config({"eval": node}, BCOS)
    assert found is not None
    x = Preprocessing.from_json(found.to_json()).transform()(image())
    assert x.shape == (6, *size)
    assert torch.equal(x[3:], 1 - x[:3])
    assert found.to_sentence().startswith(sentence)
    assert found.image_size == (size[0] if size[0] == size[1] else None)


@pytest.mark.parametrize(
    "augmentation",
    [None, {}, {"eval": {"_target_": "torch.load"}}, {"eval": {"_target_": "bcos_train.augmentation.plain", "f": 1}}],
    ids=["none", "empty", "another target", "unknown key"],
)
def test_unsupported_transforms(augmentation: Any) -> None:
    assert Preprocessing.from_config(augmentation, BCOS) is None


@pytest.mark.parametrize(
    "values", [{"size": 3}, {"resize_size": 3, "interpolation": "cubic"}, {"mean": [1], "std": [0]}, []], ids=str
)
def test_invalid_json(values: Any) -> None:
    with pytest.raises(ValueError, match="invalid preprocessing"):
        Preprocessing.from_json(values)
