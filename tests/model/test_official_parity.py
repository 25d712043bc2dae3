"""Convolutional B-cos networks against the official ones: weights, outputs, explanations."""

import copy
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from official_models import (
    CIFAR_NETS,
    CONV_NETS,
    OFFICIAL_NORMS,
    OFFICIAL_SUFFIXES,
    Narrow,
    build_official,
    calibrate_,
    images,
    narrow_official_convnext,
    official_defaults,
    perturb_,
    relative_error,
    without_norm,
)
from torch import nn
from torchvision.ops import StochasticDepth

from bcos_train import create_model
from bcos_train.nn import BcosConv2d, make_norm

#: Parameters and state dict entries of the published weights (official README and the files themselves).
PUBLISHED = {
    "resnet18": (11_693_120, 101),
    "resnet34": (21_797_568, 181),
    "resnet50": (25_538_880, 266),
    "resnet101": (44_504_896, 521),
    "resnet152": (60_125_504, 776),
    "resnext50_32x4d": (25_003_200, 266),
    "densenet121": (7_945_440, 605),
    "densenet161": (28_584_144, 805),
    "densenet169": (14_078_688, 845),
    "densenet201": (19_907_808, 1005),
    "vgg11_bnu": (132_855_872, 43),
    "convnext_tiny": (28_543_392, 100),
    "convnext_base": (88_466_304, 190),
    "convnext_tiny_bnu": (28_543_392, 169),
    "convnext_base_bnu": (88_466_304, 313),
    "densenet121_long": (7_945_440, 605),
    "resnet50_long": (25_538_880, 266),
    "resnet152_long": (60_125_504, 776),
}
#: Each of them also runs with fewer channels, below, or is one of a family of which others run.
SLOW = {
    "resnet44",
    "resnet110",
    "resnext47_16x8d",
    "resnext65_32x4d",
    "resnext65_16x8d",
    "resnext101_32x4d",
    "resnext101_16x8d",
    "resnet101",
    "resnet152",
    "resnet50_long",
    "resnet152_long",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "densenet121_long",
    "densenet161",
    "densenet201",
    "densenet190",
    "densenet250",
    *(name for name in CONV_NETS if name.startswith("vgg")),
    "convnext_tiny_bnu",
    "convnext_small",
    "convnext_base",
    "convnext_base_bnu",
    "convnext_large",
}
#: The number that divides the channels of a narrow network.
DIVISORS = {
    "densenet161": 8,
    "densenet201": 4,
    "densenet190": 10,
    "densenet250": 6,
    **dict.fromkeys((name for name in CONV_NETS if name.startswith("vgg")), 16),
    **dict.fromkeys(("convnext_small", "convnext_base", "convnext_base_bnu", "convnext_large"), 8),
}
NARROW = [f"{name} narrow" for name in DIVISORS]
#: Side of the images for those that cost more than others of their kind.
SMALLER = {"resnext29_8x64d": 8, "resnext29_16x64d": 8, "resnet110": 16, "densenet190": 8, "densenet250": 8}


@dataclass
class Pair:
    name: str
    ours: Any
    official: Any
    is_narrow: bool = False
    #: Of both, float32: in training mode, then in evaluation mode with the running statistics that came of it.
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    #: The running statistics after that.
    buffers: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def images(self, n: int = 2) -> torch.Tensor:
        return images(SMALLER.get(self.name, 32 if self.name in CIFAR_NETS else 64), n)


def build_pair(name: str, seed: int = 0, **options: Any) -> Pair:
    """Build both models with the same seed; ``" narrow"`` after the name: with fewer channels."""
    if name.endswith(" narrow"):
        return build_narrow_pair(name.removesuffix(" narrow"), seed, **options)
    torch.manual_seed(seed)
    official = build_official(name, **options)
    options = {{"norm": "norm_layer"}.get(key, key): value for key, value in options.items()}
    torch.manual_seed(seed)
    return Pair(name, create_model(name, **options), official)


def build_narrow_pair(name: str, seed: int = 0, **options: Any) -> Pair:
    """Build both models with a fraction of their channels; ``options`` have the same names in both."""
    divisor = DIVISORS[name]
    if name.startswith("convnext"):
        sizes = {"small": 96, "base": 128, "large": 192}
        width = next(width for size, width in sizes.items() if size in name) // divisor
        channels = (width, 2 * width, 4 * width, 8 * width)
        torch.manual_seed(seed)
        official = narrow_official_convnext(name, channels, **options)
        torch.manual_seed(seed)
        return Pair(name, create_model(name, channels=channels, **options), official, is_narrow=True)
    is_cifar = name in CIFAR_NETS
    narrow = partial(Narrow, divisor=divisor, num_classes=10 if is_cifar else 1000)
    defaults = official_defaults(name)
    bcos_options = {"b": 1.25 if without_norm(name) else 2, "max_out": 2 if is_cifar else 1}
    defaults["conv_layer"] = partial(defaults["conv_layer"], **bcos_options)
    theirs = {key: narrow(layer) for key, layer in defaults.items()}
    ours = {"conv_layer": narrow(partial(BcosConv2d, **bcos_options))}
    if "norm_layer" in theirs:
        ours["norm_layer"] = narrow(make_norm("bnu-linear"))
    torch.manual_seed(seed)
    official = build_official(name, **theirs, **options)
    torch.manual_seed(seed)
    return Pair(name, create_model(name, **ours, **options), official, is_narrow=True)


def share_state(pair: Pair) -> None:
    """Load our state into the official model and back."""
    pair.official.load_state_dict(pair.ours.state_dict(), strict=True)
    pair.ours.load_state_dict(pair.official.state_dict(), strict=True)


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CONV_NETS), *NARROW],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Build both models; tests must not modify them."""
    return build_pair(request.param)


@pytest.fixture(scope="module")
def trained(pair: Pair) -> Pair:
    """Build both with the same weights; after the float32 outputs in float64, with the batch's running statistics."""
    own = copy.deepcopy(pair)
    perturb_(own.ours)
    share_state(own)
    models = (own.ours, own.official)
    exact = copy.deepcopy(own.official).double()
    for mode in ("train", "eval"):
        own.outputs[mode] = []
        for model in (*models, exact):
            torch.manual_seed(1)  # of stochastic depth
            with torch.no_grad():
                own.outputs[mode].append(model.train(mode == "train")(own.images().to(next(model.parameters()).dtype)))
    own.buffers = [{key: buffer.clone() for key, buffer in model.named_buffers()} for model in models]
    # One batch has moved the running statistics by a tenth; before that a VGG's explanation is zero.
    calibrate_(own.official.double(), own.images().double())
    own.ours.double().load_state_dict(own.official.state_dict())
    for model in models:
        model.eval()
    return own


def assert_same_state(ours: nn.Module, official: nn.Module) -> None:
    state, expected = ours.state_dict(), official.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


def test_same_seed_gives_the_same_initial_state(pair: Pair) -> None:
    assert_same_state(pair.ours, pair.official)


def test_parameters_are_in_the_same_order(pair: Pair) -> None:
    assert [key for key, _ in pair.ours.named_parameters()] == [key for key, _ in pair.official.named_parameters()]


@pytest.mark.parametrize("name", sorted(SLOW))
def test_same_shapes_without_values(name: str) -> None:
    """Networks in full size that take long to initialize."""
    with torch.device("meta"):
        ours, official = create_model(name), build_official(name)
    shapes = [[(key, tensor.shape, tensor.dtype) for key, tensor in m.state_dict().items()] for m in (ours, official)]
    assert shapes[0] == shapes[1]
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in official.named_parameters()]


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items(), ids=PUBLISHED)
def test_size_of_the_published_weights(name: str, expected: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_same_outputs(trained: Pair, mode: str) -> None:
    ours, official, exact = trained.outputs[mode]
    # The rounding of float32 alone moves the official output of the deepest networks by up to 1.3e-5.
    assert relative_error(ours, official) < max(1e-5, min(2 * relative_error(official.double(), exact), 3e-5))


def test_same_running_statistics(trained: Pair) -> None:
    ours, official = trained.buffers
    assert list(ours) == list(official)
    for key, buffer in official.items():
        assert relative_error(ours[key], buffer) < 1e-5, key


def test_same_explanation(trained: Pair) -> None:
    # In float64: the gradient through a hundred layers turns float32's rounding into relative errors above 1e-4.
    assert_same_explanation(trained, trained.images(1).double(), None, 1e-9)


@pytest.mark.parametrize(
    ("name", "idx"),
    [("resnet18", None), ("resnet20", 3), ("densenet52", 3), ("densenet121", None), ("convnext_atto", None)],
)
def test_same_explanation_in_float32(name: str, idx: int | None) -> None:
    pair = build_pair(name)
    pair.ours.eval()
    pair.official.eval()
    assert_same_explanation(pair, pair.images(1), idx, 1e-4)


def assert_same_explanation(pair: Pair, x: torch.Tensor, idx: int | None, tolerance: float) -> None:
    ours = pair.ours.explain(x, idx=idx)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input tensor did not require grad")
        official = pair.official.explain(x.clone(), idx=idx)
    assert list(ours) == list(official)
    assert ours["prediction"] == official["prediction"]
    assert ours["explained_class_idx"] == official["explained_class_idx"]
    assert not x.requires_grad
    assert official["dynamic_linear_weights"].any() or (without_norm(pair.name) and not pair.is_narrow)
    for key in ("dynamic_linear_weights", "contribution_map"):
        assert relative_error(ours[key], official[key].detach()) < tolerance, key
    assert ours["explanation"].shape == official["explanation"].shape
    # The pixels whose contribution is about zero may be opaque here and transparent there.
    assert (np.abs(ours["explanation"] - official["explanation"]) > 1e-3).mean() < 1e-3


# The norm study: 12 norms with three kinds of affine parameters, and none.


@pytest.mark.parametrize("norm", ["none", *(norm + suffix for norm in OFFICIAL_NORMS for suffix in OFFICIAL_SUFFIXES)])
def test_every_norm_of_the_norm_study(norm: str) -> None:
    pair = build_pair("resnet20", norm=norm)
    assert_same_state(pair.ours, pair.official)
    perturb_(pair.ours)
    share_state(pair)
    models = (pair.ours.double(), pair.official.double())
    x = images(16, dtype=torch.float64)
    with torch.no_grad():
        ours, official = (model.train()(x) for model in models)
    assert relative_error(ours, official) < 1e-10
    ours, official = (model.eval().explain(x[:1].clone().requires_grad_()) for model in models)
    assert ours["prediction"] == official["prediction"]
    assert relative_error(ours["dynamic_linear_weights"], official["dynamic_linear_weights"]) < 1e-10


# Options.

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "b=1.5": ("resnet20", {"b": 1.5}),
    "max_out=1": ("resnet20", {"max_out": 1}),
    "max_out=2 b=1.25": ("resnet18", {"max_out": 2, "b": 1.25}),
    "num_classes=3": ("resnet20", {"num_classes": 3}),
    "in_chans=3": ("resnet18", {"in_chans": 3}),
    "logit_temperature": ("resnet20", {"logit_temperature": 10.0, "logit_bias": -2.0}),
    "zero_init_residual basic": ("resnet20", {"zero_init_residual": True}),
    "zero_init_residual bottleneck": ("resnext29_32x4d", {"zero_init_residual": True}),
    "zero_init_residual without weights": ("resnet20", {"zero_init_residual": True, "norm": "bnu-unaffine"}),
    "small_inputs": ("resnet18", {"small_inputs": True}),
    "dilated": ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
    "dilated once": ("resnet50", {"replace_stride_with_dilation": [True, False, False]}),
    "vgg without pooling": ("vgg13_bnu narrow", {"no_pool": True, "logit_bias": -1.0}),
    "vgg without norm and pooling": ("vgg11 narrow", {"no_pool": True, "logit_temperature": 0.1}),
    "densenet dropout": ("densenet52", {"drop_rate": 0.2}),
    "densenet for large images": ("densenet52", {"small_inputs": False, "num_classes": 3}),
    "densenet bottleneck": ("densenet52", {"bn_size": 2, "max_out": 1, "logit_temperature": 2.0}),
    "densenet width": ("densenet121", {"growth_rate": 8, "num_init_features": 24, "in_chans": 3, "small_inputs": True}),
    "densenet in less memory": ("densenet52", {"memory_efficient": True, "drop_rate": 0.1}),
    "densenet norm": ("densenet52", {"norm": "pn-linear", "b": 1.5}),
    "convnext": ("convnext_atto", {"stochastic_depth_prob": 0.4, "layer_scale": 0.5, "num_classes": 3}),
    "convnext norm": ("convnext_atto", {"norm": "bnu", "layer_scale": 1.0, "in_chans": 3, "b": 1.25, "max_out": 2}),
    "convnext temperature": ("convnext_atto", {"logit_temperature": 0.1, "logit_bias": 1.0, "norm": "none"}),
}


@pytest.mark.filterwarnings("ignore:dilation > 1 is much slower")
@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(name: str, options: dict[str, Any]) -> None:
    pair = build_pair(name, **options)
    assert_same_state(pair.ours, pair.official)
    models = (pair.ours.double(), pair.official.double())
    size = 8 if options.get("small_inputs") else 32
    x = images(size, n=4, in_chans=options.get("in_chans", 6), dtype=torch.float64)
    for is_training in (True, False):
        outputs = []
        for model in models:
            torch.manual_seed(1)  # of dropout and stochastic depth
            with torch.no_grad():
                outputs.append(model.train(is_training)(x))
        assert relative_error(*outputs) < 1e-10


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "resnext29_32x4d"])
def test_stochastic_depth(name: str) -> None:
    pair = build_pair(name, stochastic_depth_prob=0.3)
    drops, official_drops = (
        [(key, module.p, module.mode) for key, module in model.named_modules() if isinstance(module, StochasticDepth)]
        for model in (pair.ours, pair.official)
    )
    assert drops == official_drops
    assert drops[-1][1] == 0.3
    x, results = images(32, n=8), []
    for model in (pair.ours, pair.official, pair.ours):
        # The third time in evaluation mode, as the reference that the draws differ from.
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(model.train(len(results) < 2)(x))
    assert relative_error(results[0], results[1]) < 1e-5
    without = create_model(name).eval()
    without.load_state_dict(pair.ours.state_dict())
    with torch.no_grad():
        assert torch.equal(without(x), results[2])
        torch.manual_seed(2)
        assert relative_error(pair.ours.train()(x), results[0]) > 1e-3
