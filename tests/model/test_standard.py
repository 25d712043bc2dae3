"""Networks of torchvision under this package's interface."""

import copy
import inspect
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from bcos_train import create_model, list_models
from bcos_train.config import check
from bcos_train.config.composition import Composer
from bcos_train.model import model_signature
from bcos_train.training.config import TrainConfig

NAMES = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
]
CONFIGS = Path(__file__).parents[2] / "configs"
#: One of each family.
FAMILIES = ["resnet18", "densenet121", "vgg11_bn", "convnext_tiny"]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@cache
def twins(name: str) -> tuple[Any, nn.Module]:
    """Build our and torchvision's network with the same tensors, which tests must not modify."""
    torch.manual_seed(0)
    ours = create_model(f"standard_{name}", num_classes=7)
    with torch.device("meta"):
        official = getattr(models, name)(num_classes=7)
    official.load_state_dict(ours.state_dict(), assign=True)
    return ours, official


def test_all_are_registered() -> None:
    registered = {name for name in list_models("standard_*") if "vit" not in name}
    assert registered == {f"standard_{name}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours: Any = create_model(f"standard_{name}", num_classes=7)
        official = getattr(models, name)(num_classes=7)
    assert list(shapes(ours).items()) == list(shapes(official).items())
    assert (ours.num_classes, ours.in_chans, ours.training) == (7, 3, True)


@pytest.mark.parametrize("name", ["densenet121", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES[2:])])
def test_initial_weights(name: str) -> None:
    torch.manual_seed(0)
    ours = create_model(f"standard_{name}").state_dict()
    torch.manual_seed(0)
    official = getattr(models, name)().state_dict()
    assert all(torch.equal(ours[key], value) for key, value in official.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs(name: str) -> None:
    ours, official = twins(name)
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        for training in (True, False):
            torch.manual_seed(1)  # dropout, stochastic depth
            expected = official.train(training)(x)
            torch.manual_seed(1)
            assert torch.equal(ours.train(training)(x), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_and_head(name: str) -> None:
    model = copy.deepcopy(twins(name)[0]).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        assert torch.equal(model.get_feature_extractor()(x), features)
        logits = model(x)
        assert torch.equal(model.forward_head(features), logits)
        vector = model.forward_head(features, pre_logits=True)
        assert vector.shape == (2, model.head_hidden_size)
        classifier = model.get_classifier()
        last = classifier[-1] if isinstance(classifier, nn.Sequential) else classifier
        assert torch.equal(last(vector), logits)
        assert torch.allclose(model.to_probabilities(logits), torch.softmax(logits, 1))
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert model.num_classes == 3
        model.reset_classifier(0)
        assert torch.equal(model(x), vector)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in model.get_feature_extractor().parameters()} <= shared


def test_a_new_classifier_is_where_and_what_the_model_is() -> None:
    model: Any = create_model("standard_resnet18").to(torch.float64).eval()
    model.reset_classifier(5)
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.training
    with pytest.raises(ValueError, match="num_classes=-1: at least 0"):
        model.reset_classifier(-1)


def test_pooling() -> None:
    with torch.device("meta"):
        model: Any = create_model("standard_resnet18")
    model.reset_classifier(3, "avg")
    for num_classes, pooling in ((0, ""), (3, "max"), (0, "max")):
        with pytest.raises(ValueError, match=f"global_pool='{pooling}': "):
            model.reset_classifier(num_classes, pooling)
    assert model.num_classes == 3
    with pytest.raises(ValueError, match="torchvision's ResNet only takes 'avg'"):
        model.reset_classifier(0, "")


@pytest.mark.parametrize("name", NAMES)
def test_minimum_size(name: str) -> None:
    """Exactly the images with a feature map that is not empty are accepted."""
    with torch.device("meta"):
        model: Any = create_model(f"standard_{name}").eval()
    least = model.min_size
    for height, width in ((least, least + 1), (least + 1, least)):
        assert model(torch.rand(1, 3, height, width, device="meta")).shape == (1, 1000)
    if not name.startswith("resnet"):
        x = torch.rand(1, 3, 64, least - 1, device="meta")
        message = rf"an image of 64x{least - 1} is too small: {model.architecture} takes at least {least}x{least}$"
        with pytest.raises(ValueError, match=message):
            model(x)
        try:
            features = model.get_feature_extractor()(x)
        except RuntimeError as error:
            assert re.search(r"(?i)too small|greater than actual", str(error))  # noqa: PT017
        else:
            assert features.numel() == 0  # on the meta device torch 2.11 computes with empty maps


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_independent(clone: Any) -> None:
    model: Any = create_model("standard_resnet18").eval()
    twin, x = clone(model), torch.rand(1, 3, 32, 32)
    expected = model(x)
    nn.init.zeros_(model.fc.weight)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


def test_transform_is_torchvisions() -> None:
    model: Any = create_model("standard_resnet18")
    pixels = torch.randint(256, (300, 380, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    expected = ImageClassification(crop_size=224, resize_size=256)(image)
    assert torch.allclose(model.transform(image), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("resnet18", "zero_init_residual"),
        ("densenet121", "drop_rate"),
        ("vgg11", "dropout"),
        ("convnext_tiny", "stochastic_depth_prob"),
    ],
    ids=FAMILIES,
)
def test_options(name: str, option: str) -> None:
    assert list(model_signature(f"standard_{name}").parameters) == ["num_classes", option]
    kinds = {parameter.kind for parameter in model_signature(f"standard_{name}").parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(ValueError, match=f"no option '{option[:-1]}'; did you mean {option}"):
        create_model(f"standard_{name}", **{option[:-1]: 1})


def test_options_are_passed_on() -> None:
    last_norm: Any = create_model("standard_resnet18", zero_init_residual=True)
    assert not last_norm.layer4[-1].bn2.weight.any()
    with torch.device("meta"):
        vgg: Any = create_model("standard_vgg11", dropout=0.25)
        dense: Any = create_model("standard_densenet121", drop_rate=0.25)
        convnexts: list[Any] = [
            create_model("standard_convnext_tiny", **options) for options in ({}, {"stochastic_depth_prob": 0.0})
        ]
    assert [module.p for module in vgg.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25]
    assert dense.features.denseblock1.denselayer1.drop_rate == 0.25
    assert [model.features[-1][-1].stochastic_depth.p for model in convnexts] == [0.1, 0.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_class(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="num_classes=0: at least 1"):
        create_model(f"standard_{name}", num_classes=0)


# The configs; the values of the ResNets are compared with the official ones in tests/recipe.


@pytest.mark.parametrize("name", FAMILIES)
def test_config_is_torchvisions_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_PATH", "/imagenet")
    config, expected = (
        Composer(CONFIGS).compose("train", [f"model=standard_{model}", "dataset=imagenet"])
        for model in (name, "resnet50")
    )
    assert check(config, root=TrainConfig) == []
    assert config["model"] == expected["model"] | {"name": f"standard_{name}"}
    assert {**config, "model": None, "name": None} == {**expected, "model": None, "name": None}
    assert (config["batch_size"], config["trainer"]["max_epochs"], config["schedule"]["step_size"]) == (256, 90, 30)
