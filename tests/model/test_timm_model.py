"""Models of timm by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from bcos_train.config import UserError, check, instantiate
from bcos_train.config.composition import Composer
from bcos_train.dataset import BcosEncoding, Standardize
from bcos_train.dataset.encoding import IMAGENET_MEAN, IMAGENET_STD
from bcos_train.model import timm_model
from bcos_train.training.config import TrainConfig

COMPOSER = Composer(Path(__file__).parents[2] / "configs")


@pytest.fixture
def image() -> Image.Image:
    pixels = torch.randint(256, (250, 310, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext", "test_efficientnet"])
def test_equals_timm(name: str, image: Image.Image) -> None:
    torch.manual_seed(0)
    model: Any = timm_model(name, num_classes=7).eval()
    torch.manual_seed(0)
    expected: Any = timm.create_model(name, num_classes=7).eval()
    state = expected.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.num_classes, model.in_chans) == (7, 3)
    x = model.transform(image)
    assert torch.equal(x, create_transform(**resolve_model_data_config(expected))(image))
    assert model.transform(image.convert("L")).shape == x.shape
    with torch.no_grad():
        logits = model(x[None])
        assert torch.equal(logits, expected(x[None]))
    assert torch.allclose(model.to_probabilities(logits), logits.softmax(1))
    assert torch.equal(copy.deepcopy(model)(x[None]), logits)


def test_options() -> None:
    model: Any = timm_model("resnet18", drop_rate=0.3, drop_path_rate=0.2, model_args={"act_layer": "gelu"})
    assert model.drop_rate == 0.3
    assert model.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert type(model.act1).__name__ == "GELU"
    vit: Any = timm_model("vit_tiny_patch16_224", num_classes=5, model_args={"img_size": 32, "patch_size": 8})
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_six_channels(image: Image.Image) -> None:
    model: Any = timm_model("resnet18", in_chans=6, num_classes=5).eval()
    x = model.transform(image)
    assert x.shape == (6, 224, 224)
    assert torch.allclose(x[:3] + x[3:], torch.ones(3, 224, 224))
    assert model(x[None]).shape == (1, 5)


def test_pretrained_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def record(name: str, **options: Any) -> Any:
        received.update(options, name=name)
        return create(name, **{**options, "pretrained": False})

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", record)
    timm_model("resnet18.a1_in1k", pretrained=True, num_classes=3, model_args={"zero_init_last": False})
    expected = {"name": "resnet18.a1_in1k", "pretrained": True, "num_classes": 3, "in_chans": 3}
    assert {key: value for key, value in received.items() if value is not None} == expected | {"zero_init_last": False}


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("resnt18", {}, r"unknown timm model 'resnt18'; did you mean resnet18\?"),
    "no name near": ("zzzzzz", {}, r"unknown timm model 'zzzzzz'; see timm\.list_models\(\)"),
    "an address": ("hf-hub:timm/resnet18.a1_in1k", {}, "unknown timm model 'hf-hub:timm/resnet18.a1_in1k'"),
    "tag": (
        "resnet18.a1_in1",
        {},
        r"timm's resnet18 has no weights 'a1_in1'; did you mean a1_in1k\?; it has: .*a3_in1k",
    ),
    "no class": ("resnet18", {"num_classes": 0}, "num_classes=0: at least 1"),
    "channels": ("resnet18", {"in_chans": 4}, "in_chans=4: 3 for standardized RGB or 6"),
    "keyword": ("resnet18", {"model_args": {"dept": 3}}, r"resnet18 can't be built with \{'dept': 3\} \(.*'dept'\)"),
    "no stochastic depth": ("vgg11", {"drop_path_rate": 0.1}, r"vgg11 can't be built with \{'drop_path_rate': 0.1\}"),
    **{
        key: ("resnet18", {"model_args": {key: "x"}}, f"model_args.{key}: not a keyword of timm's resnet18 itself")
        for key in ("checkpoint_path", "pretrained_cfg", "pretrained_strict", "num_classes", "drop_rate", "model_name")
    },
}


@pytest.mark.parametrize(("name", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_model(name, **options)


# The config.


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet"])
def test_config(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/data")
    monkeypatch.setenv("IMAGENET_PATH", "/imagenet")
    config = COMPOSER.compose("train", ["model=timm", "model.name=test_resnet", f"dataset={dataset}"])
    assert check(config, root=TrainConfig) == []
    parts = TrainConfig(**instantiate(config))
    assert isinstance(parts.encoding, Standardize)
    assert torch.allclose(parts.encoding.mean.flatten(), torch.tensor(IMAGENET_MEAN))
    assert torch.allclose(parts.encoding.std.flatten(), torch.tensor(IMAGENET_STD))
    model = parts.model(num_classes=5)
    assert model(parts.encoding(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))).shape == (2, 5)


def problems(*overrides: str) -> list[str]:
    return [str(problem) for problem in check(COMPOSER.compose("train", ["model=timm", *overrides]), root=TrainConfig)]


def test_mistakes_in_the_config() -> None:
    assert problems() == ["model.name: needs a value (text): add model.name=…"]
    (problem,) = problems("model.name=resnet-18d")
    assert problem.startswith("model.name=resnet-18d: unknown timm model 'resnet-18d'; did you mean resnet18d?")
    assert len(problems("model.name=resnet18", "model.drop_rate=high", "+model.num_clases=3")) == 2
    assert problems("model.name=resnet18", "model.model_args={zero_init_last: false}") == []


def test_encoding_of_another_number_of_channels() -> None:
    config = COMPOSER.compose(
        "train", ["model=timm", "model.name=test_resnet", "model.in_chans=6", "~encoding.mean", "~encoding.std"]
    )
    config["encoding"] = {"_target_": "bcos_train.dataset.BcosEncoding"}
    parts = TrainConfig(**instantiate(config))
    assert isinstance(parts.encoding, BcosEncoding)
    assert parts.model(num_classes=5).in_chans == parts.encoding.in_channels


def test_an_error_while_building_is_one_line() -> None:
    config = COMPOSER.compose("train", ["model=timm", "model.name=resnet18", "model.model_args={checkpoint_path: x}"])
    assert check(config, root=TrainConfig) == []
    node = {key: value for key, value in config["model"].items() if key != "_partial_"}
    with pytest.raises(UserError, match=r"^model: model_args.checkpoint_path: not a keyword"):
        instantiate(node, path="model")
