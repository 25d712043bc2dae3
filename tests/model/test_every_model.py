"""Contract of all B-cos models: a sweep over the registry."""

import copy
import re
from typing import Any

import pytest
import torch
from official_models import calibrate_, perturb_, relative_error, without_norm
from torch import Tensor

from bcos_train import create_model, explain, list_models
from bcos_train.explanation import constant_term
from bcos_train.model import BcosModel
from bcos_train.model.conv_net import BcosConvNet
from bcos_train.nn import cached_weights

#: One of each family is always run, the others where there is time.
SMALL = {
    *("resnet18", "resnet20", "resnext29_16x8d", "densenet52", "densenet121", "convnext_atto", "plain_cnn9"),
    *("simple_vit_ti_patch16_224", "vitc_ti_patch1_14"),
}
MODELS = [
    name if name in SMALL else pytest.param(name, marks=pytest.mark.slow)
    for name in list_models()
    if not name.startswith(("standard_", "timm"))
]


def size_of(model: Any) -> tuple[int, int]:
    """Return height and width of the test images: odd, except for ViTs, which take multiples of their patch size."""
    if not isinstance(model, BcosConvNet):
        return 32, 48
    return (17, 13) if model.min_size < 29 else (45, 37)


def batch(model: Any, n: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, model.in_chans // 2, *size_of(model), generator=generator, dtype=torch.float64)
    return torch.cat([x, 1 - x], dim=1)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Build a model in float64 and evaluation mode, with perturbed norm parameters and running statistics."""
    torch.manual_seed(0)
    options = {"b": 1.25} if without_norm(request.param) else {}
    model: Any = create_model(request.param, **options).double()
    assert isinstance(model, BcosModel)
    perturb_(model)
    calibrate_(model, batch(model, n=4, seed=1))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_are_refused(model: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"takes floating-point images, got {dtype}"):
        model(batch(model).to(dtype))


def test_cached_weights_change_nothing(model: Any) -> None:
    """Return logits and the dynamic weights of two classes."""
    x = batch(model).requires_grad_()

    def results() -> list[Tensor]:
        with model.explanation_mode():
            logits = model(x)
            weights = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in (0, 3)]
        return [logits.detach(), *weights]

    expected = results()
    with cached_weights(model):
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        # The deepest networks magnify a rounding a million times.
        assert relative_error(ours, theirs) <= 1e-7


def test_forward_and_backward(model: Any) -> None:
    model = copy.deepcopy(model)
    logits = model(batch(model))
    assert logits.shape == (2, model.num_classes)
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_logit_is_linear_in_the_input(model: Any) -> None:
    x = batch(model)
    with torch.no_grad():
        logits = model(x)
    for target in (None, model.num_classes - 1):
        result = explain(model, x, target)
        assert relative_error(result.logits, logits) < 1e-7
        linear, constant = (x * result.weights).sum((1, 2, 3)), constant_term(model, x, target)
        # Relative to the linear part itself, which can be much smaller than the bias of the logits.
        difference = result.logits[torch.arange(2), result.target] - constant - linear
        assert (difference.abs() <= 1e-8 * linear.abs() + 1e-14 * constant.abs()).all()
        assert (result.weights.abs().amax((1, 2, 3)) > 0).all()


def test_official_explanation(model: Any) -> None:
    x = batch(model, n=1)
    result = model.explain(x)
    assert result["dynamic_linear_weights"].shape == x.shape
    assert result["explanation"].shape == (*size_of(model), 4)
    assert result["prediction"] == model(x).argmax().item()


def test_parts_make_the_whole(model: Any) -> None:
    x = batch(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[-1 if features.ndim == 3 else 1] == model.num_features
        assert torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model.get_feature_extractor()(x), features)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    inside = {id(module) for module in model.modules()}
    assert all(id(module) in inside for module in list(model.get_feature_extractor().modules())[1:])
    assert all(id(module) in inside for module in model.get_classifier().modules())


def test_images_are_independent(model: Any) -> None:
    """The result for an image doesn't depend on the rest of the batch."""
    x = batch(model, n=3)
    with torch.no_grad():
        assert relative_error(model(x[1:2]), model(x)[1:2]) < 1e-12


def test_reset_classifier(model: Any) -> None:
    model = copy.deepcopy(model)
    x = batch(model)
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
        for num_classes in (3, 0, 5):
            model.reset_classifier(num_classes)
            assert model.num_classes == num_classes
            out = model(x)
            assert out.shape == (2, num_classes or model.head_hidden_size)
            assert out.isfinite().all()
            if num_classes == 0:
                assert relative_error(out, pre_logits) < 1e-12
            assert relative_error(model.forward_head(model.forward_features(x), pre_logits=True), pre_logits) < 1e-12
    assert explain(model, x).weights.any()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="num_classes=-1: at least 0"):
        model.reset_classifier(-1)


def test_pooling(model: Any) -> None:
    """As in timm: with 0 classes the average can be removed, and the model returns the vectors of all positions."""
    model = copy.deepcopy(model)
    x = batch(model)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        model.reset_classifier(0, "avg")
        average = model(x)
        model.reset_classifier(0, "")
        assert model.global_pool == ""
        out = model(x)
        if features.ndim == 3:
            assert out.shape == features.shape  # tokens, after the head's norm
        else:
            assert out.shape == (2, model.head_hidden_size, *features.shape[2:])
            assert relative_error(out.mean((2, 3)), average) < 1e-12
        model.reset_classifier(0)
        assert torch.equal(model(x), out)
        with pytest.raises(ValueError, match=r"global_pool='' \(no average\) requires num_classes=0, got 3; .*'avg'"):
            model.reset_classifier(3)
        model.reset_classifier(logits.shape[1], "avg")
        assert model.global_pool == "avg"
        assert model(x).shape == logits.shape
        assert torch.equal(model.forward_head(features, pre_logits=True), average)
    message = "global_pool='averge'; did you mean avg?: 'avg', or with num_classes=0 '' for no average"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.reset_classifier(3, "averge")


@pytest.mark.parametrize("name", MODELS)
def test_shapes_without_values(name: str) -> None:
    with torch.device("meta"):
        model: Any = create_model(name).eval()
    features = model.forward_features(torch.rand(2, model.in_chans, 64, 64, device="meta"))
    assert features.shape[-1 if features.ndim == 3 else 1] == model.num_features
    assert model.forward_head(features).shape == (2, model.num_classes)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


#: Least height and width of the images, by architecture.
LEAST_SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18": ("resnet18", {}, 1),
    "resnet20": ("resnet20", {}, 1),
    "vgg11": ("vgg11", {}, 32),
    "vgg11 without pooling": ("vgg11", {"no_pool": True}, 1),
    "convnext_atto": ("convnext_atto", {}, 32),
    "convnext of two stages": ("convnext_atto", {"layers": (1, 1), "channels": (8, 16)}, 8),
    "densenet121": ("densenet121", {"block_config": (1, 2, 2, 1)}, 29),
    "densenet52": ("densenet52", {}, 4),
    "densenet of four blocks for small images": ("densenet52", {"block_config": (1, 2, 1, 2)}, 8),
}


@pytest.mark.parametrize(("name", "options", "least"), LEAST_SIZES.values(), ids=LEAST_SIZES)
def test_minimum_size(name: str, options: dict[str, Any], least: int) -> None:
    """Exactly the images with a feature map that is not empty are accepted."""
    with torch.device("meta"):
        model: Any = create_model(name, **options).eval()
    assert model.min_size == least
    for height, width in ((least, least + 1), (least + 1, least)):
        assert model(torch.rand(1, 6, height, width, device="meta")).shape == (1, model.num_classes)
    if least > 1:
        x = torch.rand(1, 6, least - 1, 64, device="meta")
        message = rf"an image of {least - 1}x64 is too small: {type(model).__name__} takes at least {least}x{least}$"
        with pytest.raises(ValueError, match=message):
            model(x)
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)too small|greater than actual"):
            model.get_feature_extractor()(x)


@pytest.mark.parametrize("shape", [(1, 5, 64, 64), (6, 64, 64)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "densenet52", "convnext_atto", "vgg11_bnu", "plain_cnn9"])
def test_images_of_other_shapes_are_rejected(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    with pytest.raises(ValueError, match=r"the model takes \(N, 6, H, W\), got \(" + ", ".join(map(str, shape))):
        model(torch.rand(shape, device="meta"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 6, 32, 32), "explain takes one image (1, 6, H, W), got (2, 6, 32, 32); see bcos_train.explain"),
        ((6, 32, 32), "explain takes one image (1, 6, H, W), got (6, 32, 32)"),
        ((1, 3, 32, 32), "explain takes one image (1, 6, H, W), got (1, 3, 32, 32): a B-cos network's input is [r, g"),
    ],
    ids=str,
)
def test_what_is_explained(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("resnet20").eval().explain(torch.rand(shape))


@pytest.mark.parametrize("name", ["resnet20", "simple_vit_ti_patch16_224"])
def test_color_images_need_six_channels(name: str) -> None:
    model: Any = create_model(name, in_chans=3).eval()
    message = "but this model takes (1, 3, H, W): bcos_train.explain returns its W(x) and contribution map"
    for channels in (3, 6):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.explain(torch.rand(1, channels, 32, 32))
    assert explain(model, torch.rand(1, 3, 32, 32)).weights.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_atto"])
def test_odd_photograph(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name).eval()
    result = explain(model, torch.rand(1, 6, 225, 193))
    assert result.weights.shape == (1, 6, 225, 193)
    assert result.weights.isfinite().all()
