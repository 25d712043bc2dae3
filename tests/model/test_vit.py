"""Vision transformers: completeness, constant attention, sizes, heads, errors."""

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from official_models import images, perturb_, relative_error
from PIL import Image
from torch import Tensor, nn

from bcos_train import create_model, explain, explanation_mode
from bcos_train.explanation import constant_term
from bcos_train.model import BcosModel
from bcos_train.model.vit import Attention, PositionalEmbedding
from bcos_train.nn import BcosLinear, DetachableLayerNorm, LogitLayer, NoBias

#: Small networks of both kinds, with options that the published ones have too.
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "num_classes": 5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "simple_vit": ("simple_vit_ti_patch16_224", {**SMALL, "patch_size": 4}),
    "vitc": ("vitc_ti_patch1_14", {**SMALL, "stem": (12, 12, 24)}),
    "standard_simple_vit": ("standard_simple_vit_ti_patch16_224", {**SMALL, "patch_size": 4}),
    "standard_vitc": ("standard_vitc_ti_patch1_14", {**SMALL, "stem": (12, 12, 24)}),
}
BCOS_KINDS = [kind for kind in KINDS if not kind.startswith("standard")]


def small(kind: str, **options: Any) -> Any:
    """Build a float64 network in evaluation mode with perturbed norm parameters."""
    torch.manual_seed(0)
    name, defaults = KINDS[kind]
    model = create_model(name, **{**defaults, **options}).double()
    perturb_(model)
    return model.eval()


def batch(model: Any, n: int = 2, size: int = 16) -> Tensor:
    return images(size, n, in_chans=model.in_chans, dtype=torch.float64)


def is_constant(model: nn.Module) -> list[bool]:
    """Return for each attention layer if its matrix is a constant."""
    return [module.is_in_explanation_mode for module in model.modules() if isinstance(module, Attention)]


# Completeness.

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "published simple_vit": ("simple_vit", {"dim": 192, "depth": 12, "heads": 3, "patch_size": 16}),
    "published vitc": ("vitc", {"dim": 192, "depth": 11, "heads": 3, "stem": (24, 48, 96, 192)}),
    **{kind: (kind, {}) for kind in BCOS_KINDS},
    "b=1": ("simple_vit", {"b": 1}),
    "b=1.5": ("vitc", {"b": 1.5}),
    "b=2.5 max_out=2": ("vitc", {"b": 2.5, "max_out": 2}),
    "temperature": ("simple_vit", {"logit_temperature": 3.0, "logit_bias": 0.5}),
    "three channels": ("simple_vit", {"in_chans": 3}),
    "one class": ("vitc", {"num_classes": 1}),
}


@pytest.mark.parametrize(("kind", "options"), NETWORKS.values(), ids=NETWORKS)
def test_logit_is_linear_in_the_input(kind: str, options: dict[str, Any]) -> None:
    model = small(kind, **options)
    x = batch(model, size=32)
    with torch.no_grad():
        logits = model(x)
    for target in (None, model.num_classes - 1):
        result = explain(model, x, target)
        assert relative_error(result.logits, logits) < 1e-12
        logit = logits[torch.arange(2), result.target]
        linear, constant = result.contribution_map.sum((1, 2)), constant_term(model, x, target)
        scale = torch.maximum(linear.abs(), constant.abs())
        assert ((linear + constant - logit).abs() / scale).max() < 1e-9
        assert result.weights.abs().amax() > 0


@pytest.mark.parametrize("kind", BCOS_KINDS)
def test_the_constants_are_the_positional_embedding_and_the_logit_bias(kind: str) -> None:
    model = small(kind)
    x = batch(model)
    assert (constant_term(model, x) + math.log(4)).abs().min() > 1e-6
    model[0].positional_embedding = nn.Flatten(1, 2)
    assert torch.allclose(constant_term(model, x), torch.tensor(-math.log(4), dtype=torch.float64), rtol=1e-12)


# Attention.


def attention(dim: int = 8, heads: int = 2) -> Attention:
    torch.manual_seed(0)
    module = Attention(dim, heads, BcosLinear, NoBias(DetachableLayerNorm)).double()
    perturb_(module)
    return module


def attention_matrices(module: Attention, normed_TD: Tensor) -> Tensor:
    """Compute attention matrices by definition, per image and head: ``(A, T, T)``, with rows that sum to one."""
    dim = normed_TD.shape[1]
    size = dim // module.heads
    matrices = []
    for head in range(module.heads):
        rows = slice(head * size, (head + 1) * size)
        q, k = (normed_TD @ module.to_qkv.weight[i * dim : (i + 1) * dim][rows].T for i in (0, 1))
        scores = torch.stack([torch.stack([(a * b).sum() / math.sqrt(size) for b in k]) for a in q])
        matrices.append(scores.exp() / scores.exp().sum(1, keepdim=True))
    return torch.stack(matrices)


def slow_attention(module: Attention, x_TD: Tensor, is_matrix_constant: bool) -> Tensor:
    """Compute the attention layer by definition, with the norm and output layer of the module."""
    normed, dim = module.norm(x_TD), x_TD.shape[1]
    matrices = attention_matrices(module, normed)
    if is_matrix_constant:
        matrices = matrices.detach()
    values = (normed @ module.to_qkv.weight[2 * dim :].T).split(dim // module.heads, dim=1)
    return module.to_out(torch.cat([matrix @ value for matrix, value in zip(matrices, values, strict=True)], dim=1))


@pytest.mark.parametrize("is_explaining", [False, True], ids=["training", "explanation mode"])
def test_attention_equals_its_definition(is_explaining: bool) -> None:
    """Output and gradients of either path equal the definition's, with a constant matrix in explanation mode alone."""
    module = attention()
    x = torch.randn(3, 5, 8, dtype=torch.float64).requires_grad_()
    inputs = [x, module.to_qkv.weight, module.norm.weight]
    direction = torch.randn(3, 5, 8, dtype=torch.float64)
    with explanation_mode(module) if is_explaining else nullcontext():
        out = module(x)
        expected, other = (
            torch.stack([slow_attention(module, image, is_matrix_constant) for image in x])
            for is_matrix_constant in (is_explaining, not is_explaining)
        )
    assert relative_error(out, expected) < 1e-12
    results, references, wrong = (torch.autograd.grad((y * direction).sum(), inputs) for y in (out, expected, other))
    for result, reference in zip(results, references, strict=True):
        assert relative_error(result, reference) < 1e-12
    assert relative_error(results[0], wrong[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_explanation_mode_leaves_the_output(kind: str, dtype: torch.dtype) -> None:
    """Fused attention equals the explicit computation."""
    model = small(kind).to(dtype)
    x = batch(model).to(dtype)
    with torch.no_grad():
        expected = model(x)
        with explanation_mode(model):
            assert relative_error(model(x), expected) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", BCOS_KINDS)
def test_explanation_mode_restores_its_previous_state(kind: str) -> None:
    model = small(kind)
    assert is_constant(model) == [False, False]
    with model.explanation_mode():
        with model.explanation_mode():
            assert is_constant(model) == [True, True]
        assert is_constant(model) == [True, True]
        with pytest.raises(ZeroDivisionError), model.explanation_mode():
            raise ZeroDivisionError
        assert is_constant(model) == [True, True]
    assert is_constant(model) == [False, False]
    model[0].transformer[0].attn.set_explanation_mode(True)
    explain(model, batch(model))
    assert is_constant(model) == [True, False]


@pytest.mark.parametrize("kind", BCOS_KINDS)
def test_losses_on_explanations_have_gradients(kind: str) -> None:
    model = small(kind)
    x = batch(model)
    result = explain(model, x, create_graph=True)
    torch.testing.assert_close(result.weights.detach(), explain(model, x).weights, rtol=1e-9, atol=1e-15)
    result.contribution_map.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = small(kind).train()
    model(batch(model)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


# Positional embedding and patches.


def test_positional_embedding_equals_its_definition() -> None:
    height, width, dim = 3, 4, 16
    for i, row in enumerate(PositionalEmbedding().embedding(height, width, dim)):
        y, x = divmod(i, width)
        omegas = [10_000 ** (-j / (dim // 4 - 1)) for j in range(dim // 4)]
        expected = [f(place * omega) for place in (x, y) for f in (math.sin, math.cos) for omega in omegas]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-6)


def test_positional_embedding_has_the_dtype_of_the_tokens() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert PositionalEmbedding()(torch.zeros(2, 3, 4, 8, dtype=dtype)).dtype == dtype


def test_patches_are_read_row_by_row() -> None:
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    model = create_model("simple_vit_ti_patch16_224", **SMALL, patch_size=4, in_chans=3)
    patches = model[0].to_patch_embedding.rearrage
    out = patches(x)
    assert out.shape == (2, 2, 3, 48)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(out[:, row, column], patch.permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("kind", ["simple_vit", "standard_simple_vit"])
@pytest.mark.parametrize("size", [(224, 223), (15, 16), (8, 8)], ids=str)
def test_sizes_must_be_multiples_of_the_patch_size(kind: str, size: tuple[int, int]) -> None:
    model = create_model(KINDS[kind][0], **SMALL)
    x = torch.rand(1, model.in_chans, *size)
    for call in (model, model.get_feature_extractor()):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels: .* multiples of 16, .*\(16, 32, …, 224"):
            call(x)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (6, 32, 32)], ids=str)
def test_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the model takes \(N, 6, H, W\), got"):
        create_model("simple_vit_ti_patch16_224", **SMALL)(torch.rand(shape))


def test_the_first_convolution_halves_the_size_for_any_number_of_channels() -> None:
    for in_chans in (3, 24, 64):
        model: Any = create_model("vitc_ti_patch1_14", **SMALL, in_chans=in_chans)
        assert model.forward_features(torch.rand(1, in_chans, 32, 32)).shape == (1, 4, 32)


# Head.


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_features_make_the_model(kind: str) -> None:
    model = small(kind)
    x = batch(model)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, model.num_features)
    assert torch.equal(tokens, model.get_feature_extractor()(x))
    assert torch.equal(model.forward_head(tokens), model(x))
    pre_logits = model.forward_head(tokens, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    logits, classifier = model.get_classifier()(tokens.mean(1)), model.get_classifier()
    assert torch.equal(classifier.linear(pre_logits), logits)
    assert relative_error(model(x), logits - math.log(4) if isinstance(model, BcosModel) else logits) < 1e-12
    shared = {id(module) for module in model.modules()}
    assert all(id(module) in shared for module in list(model.get_feature_extractor().modules())[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_reset_classifier(kind: str) -> None:
    model = small(kind)
    x = batch(model)
    kept = {key: value.clone() for key, value in model.state_dict().items() if "linear_head.linear" not in key}
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.load_state_dict(small(kind, num_classes=7).state_dict(), strict=True)
    model.load_state_dict(kept, strict=False)
    if isinstance(model, BcosModel):
        assert model.logit_layer.logit_bias == -math.log(6)
        assert relative_error(explain(model, x, 6).logits, model(x)) < 1e-12
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pre_logits)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="num_classes=-1: at least 0"):
        model.reset_classifier(-1)


def test_reset_classifier_keeps_the_options_of_the_layer() -> None:
    model = small("vitc", b=1.5, max_out=2)
    model.reset_classifier(4)
    linear = model.get_classifier().linear
    assert (linear.b, linear.max_out, linear.out_features) == (1.5, 2, 4)


# The rest of the interface.


@pytest.mark.parametrize("kind", BCOS_KINDS)
def test_the_network_and_its_logit_layer_by_index(kind: str) -> None:
    model = small(kind)
    assert isinstance(model, BcosModel)
    assert isinstance(model[1], LogitLayer)
    assert model[1] is model.logit_layer
    assert all(key.startswith("0.") for key in model.state_dict())
    x = batch(model)
    assert torch.equal(model[1](model[0](x)), model(x))
    assert torch.equal(model[-1](model[0](x)), model(x))


@pytest.mark.parametrize("kind", ["standard_simple_vit", "standard_vitc"])
def test_standard_networks_have_no_explain(kind: str) -> None:
    model = small(kind)
    assert not isinstance(model, BcosModel)
    assert not hasattr(model, "explain")
    probabilities = model.to_probabilities(model(batch(model)))
    assert torch.allclose(probabilities.sum(1), torch.ones(2, dtype=torch.float64))


def test_bcos_probabilities_are_independent() -> None:
    logits = torch.tensor([[0.0, 0.0]])
    assert torch.equal(small("vitc").to_probabilities(logits), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("kind", KINDS)
def test_transform(kind: str) -> None:
    model = small(kind)
    x = model.transform(Image.new("RGB", (300, 260), (255, 0, 0)))
    assert x.shape == (model.in_chans, 224, 224)
    expected = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0] if isinstance(model, BcosModel) else [(1 - 0.485) / 0.229]
    assert torch.allclose(x[: len(expected), 0, 0], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(clone: Any, kind: str) -> None:
    model = small(kind)
    x = batch(model)
    expected, twin = model(x), clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
    assert torch.equal(twin(x), expected)
    twin.reset_classifier(2)
    assert twin(x).shape == (2, 2)
    assert model(x).shape == (2, 5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"num_classes": 0}, "num_classes=0: at least 1"),
    "no channel": ({"in_chans": 0}, "in_chans=0: at least 1"),
    "no block": ({"depth": 0}, "depth=0: at least 1"),
    "no patch": ({"patch_size": 0}, "patch_size=0: at least 1"),
    "no head": ({"heads": 0}, "heads=0: at least 1"),
    "heads": ({"heads": 5}, "dim=192: .* multiple .* of heads=5"),
    "dim": ({"dim": 30, "heads": 3}, "dim=30: .* multiple of 4"),
    "small dim": ({"dim": 4, "heads": 1}, "dim=4: at least 8"),
    "typo": ({"patch_sise": 16}, r"no option 'patch_sise'; did you mean patch_size\?"),
}


@pytest.mark.parametrize("prefix", ["", "standard_"], ids=["bcos", "standard"])
@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(prefix: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(f"{prefix}simple_vit_ti_patch16_224", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": 0.5}, r"b=0\.5"),
        ({"max_out": 0}, "max_out=0"),
        ({"logit_temperature": 0.0}, r"logit_temperature=0\.0"),
        ({"stem": (24, 0)}, r"stem=\(24, 0\)"),
    ],
    ids=str,
)
def test_wrong_bcos_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("vitc_ti_patch1_14", **options)


def test_a_new_classifier_keeps_the_temperature() -> None:
    model = create_model("simple_vit_ti_patch16_224", logit_temperature=10.0)
    for num_classes in (5, 0, 7):
        model.reset_classifier(num_classes)
    assert model.logit_layer.logit_temperature == 10.0


@pytest.mark.parametrize("name", ["vitc_ti_patch1_14", "simple_vit_ti_patch16_224", "standard_vitc_ti_patch1_14"])
@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (6, 32, 32)], ids=str)
def test_wrong_inputs(name: str, shape: tuple[int, ...]) -> None:
    channels = 3 if name.startswith("standard_") else 6
    with pytest.raises(ValueError, match=rf"the model takes \(N, {channels}, H, W\), got"):
        create_model(name)(torch.zeros(shape))
