"""``forward_intermediates``, as in timm."""

import inspect
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from torch import Tensor

import bcos_train.timm  # noqa: F401
from bcos_train import create_model
from bcos_train.explanation import explanation_mode


def build(name: str, options: dict[str, Any], size: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    return model, torch.rand(2, model.in_chans, size, size)


@pytest.mark.parametrize(
    ("name", "size", "options"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_final_output_and_selection(name: str, size: int, options: dict[str, Any]) -> None:
    model, x = build(name, options, size)
    final, features = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    for indices in ([0], [0, -1], 1, (-2,)):
        found = model.forward_intermediates(x, indices, intermediates_only=True)
        chosen = features[-indices:] if isinstance(indices, int) else [features[i] for i in indices]
        assert all(torch.equal(a, b) for a, b in zip(found, chosen, strict=True))
    early, only = model.forward_intermediates(x, [0], stop_early=True)
    assert len(only) == 1
    assert early.numel() == only[0].numel()
    n = len(features)
    for wrong in (0, n + 1, [], [n], [-n - 1]):
        with pytest.raises(ValueError, match=f"there are {n} intermediate features, 0 to {n - 1}"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="output_fmt='NHWC': this network returns NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize(
    ("name", "size", "options"), FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_features_can_be_explained(name: str, size: int, options: dict[str, Any]) -> None:
    """In explanation mode the gradient of a feature is its W(x)."""
    if "vit" in name:
        pytest.skip("the positional embedding is a constant term")
    model, x = build(name, options, size)
    model, x = model.double(), x.double().requires_grad_()
    with explanation_mode(model):
        for feature in model.forward_intermediates(x, intermediates_only=True):
            value = feature[0, 0].sum()
            (weights,) = torch.autograd.grad(value, x, retain_graph=True)
            torch.testing.assert_close((weights * x).sum(), value)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("densenet121", "densenet121"),
        ("convnext_tiny", "convnext_tiny"),
        ("vgg11_bnu", "vgg11_bn"),
        ("simple_vit_ti_patch16_224", "vit_tiny_patch16_224"),
    ],
)
@pytest.mark.parametrize("indices", [None, 1, [0, -1]])
def test_shapes_are_those_of_timms_twin(name: str, theirs: str, indices: Any) -> None:
    with torch.device("meta"):
        ours, reference = create_model(name).eval(), timm.create_model(theirs).eval()
        found = ours.forward_intermediates(torch.rand(1, 6, 224, 224), indices, intermediates_only=True)  # type: ignore[operator]
        expected = reference.forward_intermediates(torch.rand(1, 3, 224, 224), indices, intermediates_only=True)
    assert [x.shape for x in found] == [x.shape for x in expected]


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "densenet121", "vgg11_bnu", "convnext_atto", "plain_cnn9"])
def test_feature_maps_are_those_of_features_only(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(f"bcos_{name}", features_only=True)
    torch.manual_seed(0)
    model, x = create_model(name), torch.rand(1, 6, 32, 32)
    with torch.no_grad():
        found = model.eval().forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        assert all(torch.equal(a, b) for a, b in zip(found, net.eval()(x), strict=True))


def test_tokens_and_norm() -> None:
    model, x = build("simple_vit_ti_patch16_224", {"depth": 2}, 48)
    _, maps = model.forward_intermediates(x)
    final, tokens = model.forward_intermediates(x, output_fmt="NLC")
    assert maps[0].shape == (2, 192, 3, 3)
    assert torch.equal(tokens[-1], final)
    assert torch.equal(maps[0].flatten(2).mT, tokens[0])
    normed = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed[0], model.get_classifier()[0](tokens[0]))


@pytest.mark.parametrize("name", ["simple_vit_ti_patch16_224", "standard_simple_vit_ti_patch16_224"])
def test_arguments_and_dictionary_of_timms_vit(name: str) -> None:
    """Positional arguments have timm's order; its masks are not supported."""
    model, x = build(name, {"depth": 2}, 48)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=48).eval()
    parameters = list(inspect.signature(theirs.forward_intermediates).parameters)
    assert list(inspect.signature(model.forward_intermediates).parameters) == [
        parameter for parameter in parameters if parameter not in ("attn_mask", "is_causal")
    ]
    final, maps = model.forward_intermediates(x, [0], True)
    for only in (False, True):
        found = model.forward_intermediates(x, [0], intermediates_only=only, output_dict=True)
        expected = theirs.forward_intermediates(x[:, :3], [0], intermediates_only=only, output_dict=True)
        assert found.keys() == expected.keys()
        assert torch.equal(found["image_intermediates"][0], maps[0])
        assert only or torch.equal(found["image_features"], final)
