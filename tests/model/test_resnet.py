"""B-cos ResNets: completeness, options, errors, consistency of features and head."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from official_models import images, perturb_, relative_error
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.explanation import constant_term
from bcos_train.nn import NORM_NAMES, BcosConv2d

NORMS = ["none", *(norm + suffix for norm in NORM_NAMES for suffix in ("", "-linear", "-unaffine"))]
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {"num_classes": 3}),
    "resnet50 dilated": ("resnet50", {"replace_stride_with_dilation": [False, True, True], "num_classes": 10}),
    "resnet56": ("resnet56", {}),
    "resnext29_32x4d": ("resnext29_32x4d", {"num_classes": 3}),
    "one class": ("resnet20", {"num_classes": 1}),
    "one class more than channels": ("resnet20", {"num_classes": 17}),
    "three channels": ("resnet20", {"in_chans": 3}),
    "b=1": ("resnet20", {"b": 1}),
    "b=1.5": ("resnet20", {"b": 1.5}),
    "b=2.5 max_out=2": ("resnet18", {"b": 2.5, "max_out": 2, "num_classes": 5}),
    "temperature": ("resnet20", {"logit_temperature": 3.0, "logit_bias": 0.5}),
    "stochastic depth": ("resnet20", {"stochastic_depth_prob": 0.5}),
    **{f"norm {norm}": ("resnet20", {"norm_layer": norm}) for norm in NORMS},
}


def trained(name: str, **options: Any) -> Any:
    """Build a float64 network in evaluation mode, with perturbed norm parameters and running statistics."""
    torch.manual_seed(0)
    model = create_model(name, **options).double()
    perturb_(model)
    with torch.no_grad():
        for seed in range(2):
            model(batch(model, seed, n=4))
    return model.eval()


def batch(model: Any, seed: int, n: int = 2) -> Tensor:
    """Make float64 images, smaller for networks that downsample less."""
    return images(16 if model.pool is None else 32, n, in_chans=model.in_chans, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize(("name", "options"), NETWORKS.values(), ids=NETWORKS)
def test_logit_is_linear_in_the_input(name: str, options: dict[str, Any]) -> None:
    model = trained(name, **options)
    x = batch(model, seed=5)
    with torch.no_grad():
        logits = model(x)
    for target in (None, model.num_classes - 1):
        result = explain(model, x, target)
        assert result.weights.shape == x.shape
        assert relative_error(result.logits, logits) < 1e-12
        logit = logits[torch.arange(2), result.target]
        parts = (x * result.weights).sum((1, 2, 3)), constant_term(model, x, target)
        scale = torch.stack([part.abs() for part in parts]).amax(0)
        assert ((parts[0] + parts[1] - logit).abs() / scale).max() < 1e-10
        assert result.weights.abs().amax() > 0


@pytest.mark.parametrize("norm", [name for name in NORMS if name.endswith(("u-linear", "u-unaffine"))])
def test_only_the_logit_bias_is_not_explained(norm: str) -> None:
    """With uncentered norms without bias, the logit bias is the only constant."""
    model = trained("resnet20", norm_layer=norm)
    constants = constant_term(model, images(32, dtype=torch.float64))
    assert torch.allclose(constants, torch.full((2,), -math.log(9), dtype=torch.float64), rtol=1e-12)


def test_dynamic_weights_depend_on_the_input_alone() -> None:
    """W(x) of an image doesn't depend on the batch."""
    model = trained("resnet20")
    x = images(32, n=3, dtype=torch.float64)
    together = explain(model, x).weights
    for n in range(3):
        assert relative_error(explain(model, x[n : n + 1]).weights, together[n : n + 1]) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnext29_32x4d"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    model(images(64 if name == "resnet18" else 32)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_channels_last(name: str) -> None:
    model = trained(name).requires_grad_(False)
    x = images(32, dtype=torch.float64)
    expected, weights = model(x), explain(model, x).weights
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert relative_error(model(x), expected) < 1e-12
    assert relative_error(explain(model, x).weights, weights) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_classifier_and_feature_extractor_make_the_model(name: str) -> None:
    model = trained(name)
    x = images(32, dtype=torch.float64)
    features = model.get_feature_extractor()(x)
    assert features.shape[1] == model.num_features
    assert torch.equal(features, model.forward_features(x))
    logits = model.logit_layer(model.get_classifier()(features).mean((2, 3)))
    assert relative_error(logits, model(x)) < 1e-12


def test_feature_extractor_shares_its_modules() -> None:
    model = create_model("resnet20")
    shared = {id(module) for module in model.modules()}
    assert all(id(module) in shared for module in list(model.get_feature_extractor().modules())[1:])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("norm", ["bnu-linear", "gn-unaffine", "none"])
def test_copies_are_independent(clone: Any, norm: str) -> None:
    model = trained("resnet20", norm_layer=norm)
    x = images(16, dtype=torch.float64)
    expected = explain(model, x)
    twin = clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
    result = explain(twin, x)
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result.weights, expected.weights)
    # The twin's explanation mode switches its own modules on, not the original's.
    with twin.explanation_mode():
        assert not any(getattr(module, "detach", False) is True for module in model.modules())


@pytest.mark.parametrize(
    ("options", "bias"),
    [({}, -math.log(9)), ({"logit_bias": 0.0}, 0.0), ({"logit_bias": 1.5}, 1.5), ({"num_classes": 1}, 0.0)],
    ids=["default", "zero", "given", "one class"],
)
def test_logit_bias(options: dict[str, Any], bias: float) -> None:
    model = trained("resnet20", **options)
    assert model.logit_layer.logit_bias == bias
    x = images(16, dtype=torch.float64)
    without = model.fc(model.forward_features(x)).mean((2, 3))
    assert relative_error(model(x), without + bias) < 1e-12


def test_norm_and_convolution_can_be_callables() -> None:
    made: list[int] = []

    def norm(channels: int) -> nn.Module:
        made.append(channels)
        return nn.Identity()

    def conv(*args: Any, **options: Any) -> BcosConv2d:
        return BcosConv2d(*args, **options, b=1.75)

    model: Any = create_model("resnet20", norm_layer=norm, conv_layer=conv)
    assert len(made) == 1 + 18 + 2
    assert {module.b for module in model.modules() if isinstance(module, BcosConv2d)} == {1.75}
    assert model(images(16)).shape == (2, 10)


def test_zero_init_residual_starts_as_the_identity() -> None:
    """With zero branches a stage equals the shortcut of its first block."""
    torch.manual_seed(0)
    model: Any = create_model("resnet20", zero_init_residual=True, norm_layer="bnu").eval()
    x = torch.rand(1, 16, 8, 8)
    assert torch.equal(model.layer1(x), x)


def test_stochastic_depth_drops_whole_branches() -> None:
    torch.manual_seed(0)
    model: Any = create_model("resnet20", stochastic_depth_prob=0.9)
    block, x = model.layer3[-1], torch.rand(64, 64, 4, 4)
    block.bn1.eval(), block.bn2.eval()
    with torch.no_grad():
        dropped = (block(x) == x).flatten(1).all(1)
        assert 40 < int(dropped.sum()) < 64
        model.layer1[0].train()
        assert model.layer1[0].stochastic_depth is None


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no class": ("resnet20", {"num_classes": 0}, r"num_classes=0: at least 1"),
    "certain drop": ("resnet20", {"stochastic_depth_prob": 1.0}, r"stochastic_depth_prob=1.0: .* less than 1"),
    "negative drop": ("resnet20", {"stochastic_depth_prob": -0.1}, r"stochastic_depth_prob=-0.1: at least 0"),
    "norm": ("resnet20", {"norm_layer": "bnu-liner"}, r"unknown norm 'bnu-liner'; did you mean bnu-linear\?"),
    "b": ("resnet20", {"b": 0.5}, r"0\.5"),
    "max_out": ("resnet20", {"max_out": 0}, r"0"),
    "temperature": ("resnet20", {"logit_temperature": 0.0}, r"logit_temperature=0\.0"),
    "dilation length": ("resnet50", {"replace_stride_with_dilation": [True]}, r"takes 3 values, got \[True\]"),
    "dilation length, three stages": (
        "resnext29_32x4d",
        {"replace_stride_with_dilation": [True] * 3},
        r"takes 2 values, got \[True, True, True\]",
    ),
    "dilated basic block": (
        "resnet18",
        {"replace_stride_with_dilation": [False, False, True]},
        r"needs the bottleneck block \(resnet50 and deeper\)",
    ),
    "wide basic block": ("resnet18", {"width_per_group": 128}, r"groups=1 and width_per_group=64"),
}


@pytest.mark.parametrize(("name", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("shape", [(6, 32, 32), (2, 6, 32, 32), (0, 6, 32, 32)], ids=str)
def test_explain_takes_one_image(shape: tuple[int, ...]) -> None:
    model: Any = create_model("resnet20").eval()
    with pytest.raises(ValueError, match=r"takes one image \(1, 6, H, W\), got"):
        model.explain(torch.rand(shape))


def test_explain_leaves_the_model_and_its_input() -> None:
    model = trained("resnet20")
    x: Tensor = images(16, n=1, dtype=torch.float64)
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    first = model.explain(x)
    kept = first["dynamic_linear_weights"].clone()
    model.explain(x, idx=0)
    assert torch.equal(first["dynamic_linear_weights"], kept)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
