"""Vision transformers against the official ones: weights, outputs, explanations."""

import warnings
from typing import Any

import pytest
import torch
from official_models import images, relative_error
from official_vits import PUBLISHED, Pair, build_official, build_pair, is_standard, official_weights, share_state
from torch import nn

from bcos_train import create_model, explain, list_models

SLOW = [name for name in PUBLISHED if "_b_" in name or "_l_" in name]
BCOS = [name for name in PUBLISHED if not is_standard(name)]


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture(scope="module", params=marked(list(PUBLISHED)))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Build both with one seed, with norms that differ from channel to channel; evaluation mode, float32."""
    pair = build_pair(request.param)
    state, expected = pair.ours.state_dict(), pair.official.state_dict()
    pair.differences = [key for key in expected if key not in state or not torch.equal(state[key], expected[key])]
    return share_state(pair)


def test_all_published_vits_are_there() -> None:
    assert list_models("*vit*") == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_parameters_as_the_published_weights(name: str) -> None:
    with torch.device("meta"):
        ours, official = create_model(name), build_official(name)
    assert (sum(p.numel() for p in ours.parameters()), len(ours.state_dict())) == PUBLISHED[name]
    for get in (nn.Module.named_parameters, lambda model: model.state_dict().items()):
        assert [(key, value.shape) for key, value in get(ours)] == [(key, value.shape) for key, value in get(official)]


def test_same_seed_gives_the_same_initial_state(pair: Pair) -> None:
    assert list(pair.ours.state_dict()) == list(pair.official.state_dict())
    assert pair.differences == []


def test_same_outputs(pair: Pair) -> None:
    x = images(224 if pair.name in SLOW else 64, 2, in_chans=pair.ours.in_chans)
    # Of a B-cos network also before the logit bias, which is greater than all else in random logits.
    parts = [(pair.ours, pair.official)] + ([] if is_standard(pair.name) else [(pair.ours[0], pair.official[0])])
    with torch.no_grad():
        for ours, official in parts:
            assert relative_error(ours(x), official(x)) < 1e-5


def test_same_dynamic_weights(pair: Pair) -> None:
    """The gradients of the standard networks are equal in float32 and in float64."""
    x = images(32, 2, in_chans=pair.ours.in_chans)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        pair.to(dtype)
        if is_standard(pair.name):
            ours, expected = (official_weights(model, x.to(dtype), 7) for model in (pair.ours, pair.official))
        else:
            ours = explain(pair.ours, x.to(dtype), 7).weights
            with pair.official.explanation_mode():
                expected = official_weights(pair.official, x.to(dtype), 7)
        assert relative_error(ours, expected) < tolerance
    pair.to(torch.float32)


@pytest.mark.parametrize("name", [name for name in BCOS if "_ti_" in name])
def test_same_explanation(name: str) -> None:
    pair = share_state(build_pair(name)).to(torch.float64)
    x = images(32, 1, dtype=torch.float64)
    for idx in (None, 3):
        ours = pair.ours.explain(x, idx=idx)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input tensor did not require grad")
            official = pair.official.explain(x.clone(), idx=idx)
        assert list(ours) == list(official)
        assert ours["prediction"] == official["prediction"]
        assert ours["explained_class_idx"] == official["explained_class_idx"]
        for key in ("dynamic_linear_weights", "contribution_map"):
            assert relative_error(ours[key], official[key].detach()) < 1e-9, key
        difference = torch.from_numpy(ours["explanation"] - official["explanation"]).abs()
        # The pixels whose contribution is about zero may be opaque here and transparent there.
        assert (difference > 1e-3).double().mean() < 1e-3


@pytest.mark.parametrize("name", [name for name in BCOS if "_ti_" in name])
def test_attention_takes_part_in_the_gradient_of_an_explanation(name: str) -> None:
    """The official code detaches it, although W(x) depends on it: tests/explanation/test_explanation_graph.py."""
    pair = share_state(build_pair(name)).to(torch.float64)
    x = images(32, 2, dtype=torch.float64)
    weights = explain(pair.ours, x, 3, create_graph=True).weights
    with pair.official.explanation_mode():
        official = official_weights(pair.official, x, 3, create_graph=True)
    assert relative_error(weights.detach(), official.detach()) < 1e-9
    weights.square().sum().backward()
    official.square().sum().backward()
    queries_and_keys = pair.official[0].transformer.encoder_0.attn.to_qkv.weight.grad[: 2 * 192]
    assert queries_and_keys.abs().max() == 0
    assert pair.ours[0].transformer.encoder_0.attn.to_qkv.weight.grad[: 2 * 192].abs().max() > 0


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "b=1.5": ("simple_vit_ti_patch16_224", {"b": 1.5}),
    "max_out=2 b=1.25": ("vitc_ti_patch1_14", {"max_out": 2, "b": 1.25}),
    "num_classes=3": ("vitc_ti_patch1_14", {"num_classes": 3, "logit_bias": 0.5}),
    "in_chans=3": ("simple_vit_ti_patch16_224", {"in_chans": 3}),
    "standard in_chans=6": ("standard_vitc_ti_patch1_14", {"in_chans": 6, "num_classes": 10}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(name: str, options: dict[str, Any]) -> None:
    pair = share_state(build_pair(name, **options)).to(torch.float64)
    x = images(32, in_chans=pair.ours.in_chans, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(pair.ours(x), pair.official(x)) < 1e-10


SIZES = {
    "simple_vit_ti_patch16_224": [(16, 16), (32, 80), (240, 16)],
    "vitc_ti_patch1_14": [(1, 1), (15, 15), (17, 50), (48, 16)],
}


@pytest.mark.parametrize("prefix", ["", "standard_"], ids=["bcos", "standard"])
@pytest.mark.parametrize("name", SIZES)
def test_other_image_sizes(prefix: str, name: str) -> None:
    pair = share_state(build_pair(prefix + name)).to(torch.float64)
    for height, width in SIZES[name]:
        x = images(max(height, width), in_chans=pair.ours.in_chans, dtype=torch.float64)[..., :height, :width]
        with torch.no_grad():
            tokens, logits = pair.ours.forward_features(x), pair.ours(x)
            assert tokens.shape == (2, -(-height // 16) * -(-width // 16), 192)
            assert relative_error(logits, pair.official(x)) < 1e-10
