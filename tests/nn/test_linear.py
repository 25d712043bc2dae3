import copy
import pickle

import pytest
import torch
from bcos.modules import BcosLinear as OfficialBcosLinear
from torch import Tensor, nn

from bcos_train.nn import BcosLinear, NormedLinear

from .helpers import assert_near, slow_transform

SHAPES = [(5,), (1, 5), (3, 5), (2, 7, 5), (2, 3, 4, 5)]
BS_AND_MAX_OUTS = [(1, 1), (1, 2), (1.25, 2), (2, 1), (2, 2), (2.5, 3)]


def slow_bcos_linear(x: Tensor, weight: Tensor, b, max_out: int = 1, explain: bool = False) -> Tensor:
    norm = x.square().sum(-1).sqrt() + 1e-12
    out = []
    for first in range(0, len(weight), max_out):
        products = [(x * w).sum(-1) / w.square().sum().sqrt() for w in weight[first : first + max_out]]
        out.append(slow_transform(torch.stack(products).max(0).values, norm, b, explain))
    return torch.stack(out, dim=-1)


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad(out, [x, layer.linear.weight], cotangent.to(out.dtype))


@pytest.mark.parametrize("mode", ["train", "eval", "explanation"])
@pytest.mark.parametrize(("b", "max_out"), BS_AND_MAX_OUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_official(shape, b, max_out, mode):
    torch.manual_seed(0)
    official = OfficialBcosLinear(5, 4, b=b, max_out=max_out)
    torch.manual_seed(0)
    ours = BcosLinear(5, 4, b=b, max_out=max_out)
    assert ours.state_dict().keys() == official.state_dict().keys()
    assert torch.equal(ours.linear.weight, official.linear.weight), "another initialisation under the same seed"
    for layer in (ours, official):
        layer.train(mode == "train")
        layer.set_explanation_mode(mode == "explanation")
    x = torch.randn(shape)
    results = zip(run(ours, x), run(official, x), ("output", "dx", "dw"), (1e-5, 1e-4, 1e-4), strict=True)
    for mine, reference, what, tolerance in results:
        assert_near(mine, reference, tolerance, what)


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize(("b", "max_out"), BS_AND_MAX_OUTS)
def test_equals_slow_reference(b, max_out, explain):
    torch.manual_seed(0)
    layer = BcosLinear(5, 4, b=b, max_out=max_out, dtype=torch.float64)
    layer.set_explanation_mode(explain)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = layer.linear.weight
    out, reference = layer(x), slow_bcos_linear(x, weight, b, max_out, explain)
    assert_near(out.detach(), reference.detach(), 1e-12)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x, weight], cotangent)
    for mine, theirs in zip(ours, torch.autograd.grad(reference, [x, weight], cotangent), strict=True):
        assert_near(mine, theirs, 1e-10)


@pytest.mark.parametrize("b", [1, 1.25, 2, 2.5])
def test_gradient_in_explanation_mode_is_the_linear_map(b):
    torch.manual_seed(0)
    net = nn.Sequential(BcosLinear(6, 8, b=b, max_out=2), BcosLinear(8, 3, b=b)).double()
    for layer in net:
        layer.set_explanation_mode()
    x = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    out = net(x)
    for unit in range(3):
        (linear_map,) = torch.autograd.grad(out[:, unit].sum(), x, retain_graph=True)
        assert_near((linear_map * x).sum(1).detach(), out[:, unit].detach(), 1e-10)


@pytest.mark.parametrize("b", [1.5, 2, "learnable"])
def test_gradcheck_twice(b):
    torch.manual_seed(0)
    given = nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) if b == "learnable" else b
    layer = BcosLinear(3, 2, b=given, max_out=2, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize("b", [1, 1.1, 1.5, 2, 3.7])
def test_zero_input_is_finite(b, explain):
    torch.manual_seed(0)
    layer = BcosLinear(5, 4, b=b, max_out=2)
    layer.set_explanation_mode(explain)
    x = torch.randn(3, 5)
    x[1] = 0
    for result in run(layer, x):
        assert torch.isfinite(result).all()
    assert (layer(x)[1] == 0).all()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), [layer.linear.weight, x], allow_unused=True)
    assert all(torch.isfinite(value).all() for value in second if value is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("b", [1.25, 2])
def test_autocast_keeps_the_norm_in_float32(b, dtype):
    torch.manual_seed(0)
    layer = BcosLinear(64, 8, b=b, max_out=2)
    x = torch.randn(4, 64)
    x[0], x[1] = 300.0, 0.0
    reference = layer(x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
        from_half = layer(x.to(dtype))
    (gradient,) = torch.autograd.grad(out.float().square().mean() + from_half.float().mean(), x)
    assert torch.isfinite(gradient).all()
    for result in (out, from_half):
        assert result.dtype == dtype
        assert_near(result.detach(), reference.detach(), 4e-3 if dtype == torch.float16 else 3e-2)


def test_learnable_b():
    torch.manual_seed(0)
    b = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    layer = BcosLinear(5, 4, b=b, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    (ours,) = torch.autograd.grad(layer(x).sum(), b)
    (theirs,) = torch.autograd.grad(slow_bcos_linear(x, layer.linear.weight, b).sum(), b)
    assert_near(ours, theirs, 1e-10)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"b": 0.5}, ValueError),
        ({"max_out": 0}, ValueError),
        ({"maxout": 2}, TypeError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        BcosLinear(5, 4, **kwargs)


def test_bias_is_third_as_in_torch():
    assert BcosLinear(5, 4, False).linear.bias is None
    layer = BcosLinear(5, 4, True, normalize_weight=False, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    out = x @ layer.linear.weight.T + layer.linear.bias
    assert_near(layer(x).detach(), (out * out.abs() / x.norm(dim=1, keepdim=True)).detach(), 1e-11)


def test_copies_and_pickles():
    layer = BcosLinear(5, 4, b=1.5, max_out=2)
    x = torch.rand(3, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    layer = BcosLinear(5, 4, b=1.5, max_out=2)
    x = torch.rand(3, 5)
    assert_near(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).detach(), layer(x).detach(), 1e-6)


def test_normed_linear_has_unit_weights_and_may_have_a_bias():
    torch.manual_seed(0)
    layer = NormedLinear(5, 4)
    x = torch.randn(3, 5)
    assert_near(layer(x).detach(), (slow_bcos_linear(x, layer.weight, 1) + layer.bias).detach(), 1e-5)
