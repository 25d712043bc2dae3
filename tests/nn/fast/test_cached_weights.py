"""A network with frozen weights against itself with live ones."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train.explanation import explanation_mode
from bcos_train.nn import (
    BcosConv2d,
    BcosLinear,
    Linear,
    cached_weights,
    live_weights,
    make_norm,
    set_backend,
)
from bcos_train.nn.backend import Accelerated, Backend
from bcos_train.nn.fast.dispatch import CACHE


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are folded by the fused operations alone."""
    monkeypatch.setattr(Accelerated, "backend", "fused")


def net(norm: str = "bnu-linear", **options: Any) -> nn.Sequential:
    """Two convolutions with norms whose scales are of either sign, and one of them 0."""
    torch.manual_seed(0)
    make = make_norm(norm)
    layers = nn.Sequential(
        BcosConv2d(6, 8, 3, padding=1, **options), make(8), BcosConv2d(8, 4, 3, stride=2, padding=1, **options), make(4)
    )
    for module in layers:
        if getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight)
            module.weight.data[1] = 0
        if getattr(module, "running_var", None) is not None:
            module.running_var.uniform_(0.1, 3)
    return layers.double().eval()


def image() -> Tensor:
    x = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[0, :, :4, :4] = 0
    return x


OPTIONS: dict[str, dict[str, Any]] = {
    "B=2": {},
    "unaffine": {"norm": "bnu-unaffine"},
    "groups": {"groups": 2},
    "MaxOut": {"max_out": 2},
    "MaxOut of groups": {"max_out": 3, "groups": 2},
    "B=1": {"b": 1},
    "B=1.25": {"b": 1.25},
    "B=2.5 MaxOut": {"b": 2.5, "max_out": 2},
    "centered": {"norm": "bn"},
    "bias": {"norm": "bnu"},
    "dilated": {"dilation": 2},
    "position norm": {"norm": "pnu-linear"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_dynamic_weights_stay(name: str) -> None:
    model, x = net(**OPTIONS[name]), image().requires_grad_()
    with torch.no_grad():
        expected = model(x)
    with explanation_mode(model):
        (expected_weights,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    with cached_weights(model):
        with torch.no_grad():
            out = model(x)
        with explanation_mode(model):
            (weights,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_true_gradients_of_the_input_stay(name: str) -> None:
    model, x = net(**OPTIONS[name]), image().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with cached_weights(model):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["B=2", "MaxOut of groups", "B=1.25"])
def test_dynamic_weights_are_a_linear_map_to_autograd(name: str) -> None:
    """Differentiated twice: the map's transpose is linear in the gradient that it is given."""
    model, x = net(**OPTIONS[name]), image().requires_grad_()
    with cached_weights(model), explanation_mode(model):
        out = model(x)
        grad = torch.randn_like(out).requires_grad_()
        (pulled,) = torch.autograd.grad(out, x, grad, create_graph=True)
        (back,) = torch.autograd.grad(pulled, grad, x)
    torch.testing.assert_close(back, out.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"max_out": 2}, {"b": 1.5, "max_out": 3}], ids=str)
@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6)], ids=str)
def test_linear_layers(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Linear(6, 8, bias=False), BcosLinear(8, 4, **options)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = model(x).detach()
    with explanation_mode(model):
        (expected_weights,) = torch.autograd.grad(model(x).select(-1, 2).sum(), x)
        with cached_weights(model):
            out = model(x)
            grad = torch.randn_like(out).requires_grad_()
            (pulled,) = torch.autograd.grad(out, x, grad, create_graph=True)
            (back,) = torch.autograd.grad(pulled, grad, x)
            (weights,) = torch.autograd.grad(model(x).select(-1, 2).sum(), x)
            assert not model(x.detach()).requires_grad
    torch.testing.assert_close(out.detach(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(back, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("place", ["0", "0.linear", "1"])
def test_hooks_see_the_same_values(place: str) -> None:
    model, x, seen = net(), image(), []
    module = model.get_submodule(place)
    module.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        model(x)
        with cached_weights(model):
            model(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-14)


def test_changes_are_not_seen_inside() -> None:
    model, x = net(), image()
    expected = model(x)
    with cached_weights(model), torch.no_grad():
        model[0].linear.weight.mul_(-1)
        torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_no_gradient_reaches_the_weights(backend: Backend) -> None:
    model = nn.Sequential(BcosLinear(6, 4), Linear(4, 4, bias=False))
    set_backend(model, backend)
    with cached_weights(model):
        assert not model(torch.ones(1, 6)).requires_grad


def test_nests_and_thaws_after_an_exception() -> None:
    model = net()
    with contextlib.suppress(ValueError), cached_weights(model):
        with cached_weights(model):
            pass
        assert model[0].linear in CACHE.weights
        model(torch.zeros(3))
    assert model[0].linear not in CACHE.weights


def test_a_copy_is_not_frozen() -> None:
    model = net()
    with cached_weights(model):
        twin = copy.deepcopy(model)
    twin.train()(image()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_another_thread_uses_the_weights_as_they_are() -> None:
    model, x = net(), image()
    expected = model(x)
    with cached_weights(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, x).result(), expected)


def test_explanation_after_inference_mode() -> None:
    model, x = net(), image().requires_grad_()
    with torch.inference_mode(), cached_weights(model), torch.inference_mode(False), explanation_mode(model):
        model(x).sum().backward()
    assert x.grad is not None


def test_live_weights_get_gradients() -> None:
    model, x = net(), image()
    expected = model(x).detach()
    with cached_weights(model), live_weights():
        out = model(x)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    assert model[0].linear.weight.grad is not None


def test_casting_inside_is_refused() -> None:
    model = net()
    with cached_weights(model), pytest.raises(RuntimeError, match=r"moved or cast within cached_weights\(\)"):
        model.float()(image().float())


def test_state_is_that_of_outside() -> None:
    model = net()
    expected = copy.deepcopy(model.state_dict())
    with cached_weights(model):
        inside = model.state_dict()
    assert inside.keys() == expected.keys()
    assert all(torch.equal(inside[key], value) for key, value in expected.items())
