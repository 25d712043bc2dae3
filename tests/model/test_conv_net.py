"""Convolutional networks and the additions of each family: head, memory, options, transforms."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from official_models import images, perturb_, relative_error
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.model import BcosConvNeXt, BcosDenseNet, BcosModel, BcosVGG
from bcos_train.nn import BatchNormUncentered2d, BcosConv2d, DetachablePositionNorm2d

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet20", {"inplanes": 4}),
    "densenet": ("densenet52", {"growth_rate": 4, "num_init_features": 8, "block_config": (2, 2, 2)}),
    "convnext": ("convnext_atto", {"layers": (1, 2), "channels": (8, 16), "num_classes": 10}),
}


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Any:
    """Build one network of each family, in float64 and evaluation mode."""
    name, options = TINY[request.param]
    torch.manual_seed(0)
    model: Any = create_model(name, **options).double()
    perturb_(model)
    return model.eval()


def batch(n: int = 2, seed: int = 0) -> Tensor:
    return images(16, n, seed=seed, dtype=torch.float64)


# The head.


def test_classifier_is_called_as_a_module(tiny: Any) -> None:
    """Hooks on the classifier see the logits at each position."""
    seen: list[Tensor] = []
    tiny.get_classifier().register_forward_hook(lambda module, args, output: seen.append(output))
    logits = tiny(batch())
    assert relative_error(tiny.logit_layer(seen[0].mean((2, 3))), logits) < 1e-12


def test_new_classifier_has_the_weights_of_the_family(tiny: Any) -> None:
    """Weights are drawn as in the constructor: same spread, other numbers."""
    last: Any = list(tiny.get_classifier().modules())[-1]
    old = last.weight.detach().clone()
    tiny.reset_classifier(10)
    new = list(tiny.get_classifier().modules())[-1].weight
    assert new.shape == old.shape
    assert not torch.equal(new, old)
    assert 0.5 < new.std() / old.std() < 2


def test_new_classifier_changes_nothing_else(tiny: Any) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    keys = list(before)
    tiny.reset_classifier(3)
    after = tiny.state_dict()
    assert list(after) == keys
    changed = [key for key in keys if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])]
    assert len(changed) == 1
    assert changed[0].startswith(tiny.logit_conv_name)


def test_new_classifier_keeps_the_temperature() -> None:
    model: Any = create_model("resnet20", inplanes=4, logit_temperature=4.0, logit_bias=1.0)
    model.reset_classifier(5)
    assert model.logit_layer.logit_temperature == 4.0
    assert model.logit_layer.logit_bias == -math.log(4)


def test_convolution_may_come_in_a_sequence() -> None:
    """A ``conv_layer`` of several modules is replaced as a whole."""

    def conv(*channels: int, **options: Any) -> nn.Module:
        return nn.Sequential(BcosConv2d(*channels, **options), nn.Identity())

    model: Any = create_model("resnet20", inplanes=4, conv_layer=conv)
    assert model.forward_head(model.forward_features(images(8)), pre_logits=True).shape == (2, 16)
    model.reset_classifier(3)
    assert model(images(8)).shape == (2, 3)
    assert isinstance(model.fc[1], nn.Identity)


def test_inputs_are_unchanged(tiny: Any) -> None:
    x = batch()
    before = x.clone()
    tiny.train()(x)
    features = tiny.eval().forward_features(x)
    kept = features.clone()
    tiny.forward_head(features)
    explain(tiny, x)
    assert torch.equal(x, before)
    assert torch.equal(features, kept)


def test_copies_and_pickles(tiny: Any) -> None:
    expected = tiny(batch())
    for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert torch.equal(twin(batch()), expected)
        twin.reset_classifier(3)
    assert torch.equal(tiny(batch()), expected)


def test_channels_last(tiny: Any) -> None:
    tiny.requires_grad_(False)
    x = batch()
    expected, weights = tiny(x), explain(tiny, x).weights
    tiny.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert relative_error(tiny(x), expected) < 1e-12
    assert relative_error(explain(tiny, x).weights, weights) < 1e-12


# Options of the families.


def test_vgg_without_norm_keeps_the_indices() -> None:
    with torch.device("meta"):
        plain, normed, pooled = create_model("vgg11"), create_model("vgg11_bnu"), create_model("vgg11", no_pool=True)
    convs = [[key for key in m.state_dict() if key.endswith("linear.weight")] for m in (plain, normed)]
    assert convs[0] == convs[1]
    assert not any(isinstance(module, nn.AvgPool2d) for module in pooled.modules())
    strides = [m.stride for m in pooled.features.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    assert strides == [(2, 2), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2)]


def test_norm_of_the_convnexts() -> None:
    with torch.device("meta"):
        position, batch_norm = create_model("convnext_tiny"), create_model("convnext_tiny_bnu")
    kinds = {(type(m), m.eps, m.bias) for m in position.modules() if isinstance(m, DetachablePositionNorm2d)}
    assert kinds == {(DetachablePositionNorm2d, 1e-6, None)}
    kinds = {(type(m), m.eps, m.bias) for m in batch_norm.modules() if isinstance(m, BatchNormUncentered2d)}
    assert kinds == {(BatchNormUncentered2d, 1e-5, None)}


def test_cifar_densenets_have_the_norm_study_s_options() -> None:
    for name in ("densenet52", "densenet100"):
        with torch.device("meta"):
            model: Any = create_model(name)
        assert model.num_classes == 10
        convs = [m for m in model.modules() if isinstance(m, BcosConv2d)]
        assert len(convs) == int(name.removeprefix("densenet"))
        assert {conv.max_out for conv in convs} == {2}


def test_transforms_of_the_rows() -> None:
    """The long recipe resizes to 232 px instead of 256 before the crop; small images are not resized."""
    long = {"resnet50_long", "resnet152_long", "densenet121_long", "convnext_tiny", "convnext_base_bnu"}
    names = {*long, "resnet50", "densenet121", "vgg11_bnu", "densenet52", "resnet20"}
    sizes: dict[str, int | None] = {}
    for name in names:
        with torch.device("meta"):
            model: Any = create_model(name)
        assert isinstance(model, BcosModel)
        resizes = [step for step in model.transform.geometry.transforms if hasattr(step, "interpolation")]
        sizes[name] = resizes[0].size[0] if resizes else None
    short: dict[str, int | None] = {"densenet52": None, "resnet20": None}
    assert sizes == {name: 232 if name in long else short.get(name, 256) for name in names}
    with torch.device("meta"):
        assert repr(create_model("resnet50_long", small_inputs=True).transform) == repr(
            create_model("resnet20").transform
        )


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "drop rate": (BcosDenseNet, {"drop_rate": 1.0}, r"drop_rate=1.0: at least 0 and less than 1"),
    "no block": (BcosDenseNet, {"block_config": ()}, r"block_config=\(\): at least one block"),
    "densenet classes": (BcosDenseNet, {"num_classes": 0, "block_config": (1,)}, r"num_classes=0: at least 1"),
    "vgg layers": (BcosVGG, {"layers": (1, 1)}, r"layers=\(1, 1\): 5 numbers of at least 1"),
    "vgg empty stage": (BcosVGG, {"layers": (1, 0, 1, 1, 1)}, r"layers=\(1, 0, 1, 1, 1\): 5 numbers"),
    "stages": (BcosConvNeXt, {"layers": (1, 1), "channels": (8,)}, r"layers=\(1, 1\), channels=\(8,\): one number"),
    "no stage": (BcosConvNeXt, {"layers": (), "channels": ()}, r"layers=\(\), channels=\(\): one number per stage"),
    "certain drop": (
        BcosConvNeXt,
        {"layers": (1,), "channels": (8,), "stochastic_depth_prob": 1.0},
        r"stochastic_depth_prob=1.0: .* less than 1",
    ),
}


@pytest.mark.parametrize(("network", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(network: Any, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network(**options)


def test_a_new_classifier_keeps_the_temperature() -> None:
    model = create_model("resnet20", logit_temperature=10.0)
    for num_classes in (5, 0, 7):
        model.reset_classifier(num_classes)
    assert model.logit_layer.logit_temperature == 10.0
    assert model.logit_layer.logit_bias == pytest.approx(-math.log(6))
