import inspect
from collections.abc import Iterator

import pytest
import torch
from official_models import CIFAR_NETS, CONV_NETS, RESNETS
from torch import nn
from torchvision import models

from bcos_train import create_model, list_models
from bcos_train.model import BcosModel, model_signature, register_model, registry
from bcos_train.nn import BACKENDS, BcosConv2d


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is registered in the test is gone after it."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
        yield


def test_list_models() -> None:
    assert len(set(list_models())) == len(list_models())
    assert list_models("wide_*") == ["wide_resnet50_2", "wide_resnet101_2"]
    assert list_models("resnet?0") == ["resnet50", "resnet20"]
    assert list_models("Resnet*") == []
    assert list_models("resnet") == []
    assert len(RESNETS) == 26
    assert len(CIFAR_NETS) == 15 + 4
    assert len(CONV_NETS) == 26 + 9 + 8 + 7


@pytest.mark.parametrize("name", CONV_NETS)
def test_defaults(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, BcosModel)
    assert model.training
    is_cifar = name in CIFAR_NETS
    assert (model.num_classes, model.in_chans) == (10 if is_cifar else 1000, 6)
    if name in RESNETS:
        assert (model.pool is None) == is_cifar


@pytest.mark.parametrize(
    "depth", [18, 34, 50, pytest.param(101, marks=pytest.mark.slow), pytest.param(152, marks=pytest.mark.slow)]
)
def test_standard_resnets_are_torchvision_networks(depth: int) -> None:
    torch.manual_seed(0)
    ours = create_model(f"standard_resnet{depth}", num_classes=7).state_dict()
    torch.manual_seed(0)
    expected = getattr(models, f"resnet{depth}")(num_classes=7).state_dict()
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet5", "resnet50"), ("ResNet-18", "resnet18"), ("resnext50", "resnext50_32x4d"), ("renset20", "resnet20")],
)
def test_unknown_model_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean {nearest}\\?"):
        create_model(name)


def test_unknown_model_without_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'xyz'; see bcos_train.list_models\(\)"):
        create_model("xyz")


@pytest.mark.parametrize(
    ("name", "option", "nearest"),
    [
        ("resnet20", "num_class", "num_classes"),
        ("resnet20", "maxout", "max_out"),
        ("resnet50", "norm", "norm_layer"),
        ("standard_resnet18", "num_clases", "num_classes"),
    ],
)
def test_unknown_option_names_the_nearest(name: str, option: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no option '{option}'; did you mean {nearest}\\?"):
        create_model(name, **{option: 3})


@pytest.mark.usefixtures("registered")
def test_register() -> None:
    def tiny(num_classes: int = 4, width: int = 3) -> nn.Module:
        return nn.Linear(width, num_classes)

    register_model("tiny", tiny)
    assert list_models("tiny") == ["tiny"]
    assert create_model("tiny", width=5).weight.shape == (4, 5)
    assert list(model_signature("tiny").parameters) == ["num_classes", "width"]
    with pytest.raises(ValueError, match="'tiny' is already registered"):
        register_model("tiny", tiny)


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "standard_resnet18"])
def test_config_signature_lists_the_options_of_the_model(name: str) -> None:
    signature = create_model.config_signature({"name": name})  # type: ignore[attr-defined]
    common = ["name", "pretrained", "weights", "backend", "grad_checkpointing"]
    assert list(signature.parameters) == [*common, *model_signature(name).parameters]
    assert {p.kind for p in signature.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_config_signature_without_a_name() -> None:
    signature = create_model.config_signature({})  # type: ignore[attr-defined]
    assert list(signature.parameters) == ["name", "pretrained", "weights", "backend", "grad_checkpointing"]
    with pytest.raises(ValueError, match="did you mean resnet20"):
        create_model.config_signature({"name": "resnet-20x"})  # type: ignore[attr-defined]


def test_backend() -> None:
    for backend in BACKENDS:
        model = create_model("resnet20", backend=backend)
        assert {module.backend for module in model.modules() if isinstance(module, BcosConv2d)} == {backend}
    with pytest.raises(ValueError, match="did you mean reference"):
        create_model("resnet20", backend="referense")  # type: ignore[arg-type]
