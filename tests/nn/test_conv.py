import copy
import pickle

import pytest
import torch
from bcos.modules import BcosConv2d as OfficialBcosConv2d
from torch import nn

from bcos_train.nn import BcosConv2d, NormedConv2d

from .helpers import assert_near, slow_bcos_conv2d

# Where the official layer is right.
SHARED = {
    "1x1": ({"in_channels": 6, "out_channels": 5}, (2, 6, 5, 7)),
    "1x1-stride": ({"in_channels": 6, "out_channels": 5, "stride": 2}, (2, 6, 5, 7)),
    "3x3": ({"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1}, (2, 6, 7, 5)),
    "7x7-stride": ({"in_channels": 6, "out_channels": 4, "kernel_size": 7, "stride": 2, "padding": 3}, (1, 6, 15, 13)),
    "no-padding": ({"in_channels": 3, "out_channels": 4, "kernel_size": 3}, (1, 3, 3, 3)),
    "even": ({"in_channels": 3, "out_channels": 4, "kernel_size": 4, "stride": 4}, (2, 3, 9, 8)),
    "tuples": (
        {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
        (2, 3, 8, 9),
    ),
    "1x1-map": ({"in_channels": 8, "out_channels": 4, "kernel_size": 3, "padding": 1}, (3, 8, 1, 1)),
    "groups": ({"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2}, (2, 6, 6, 5)),
    "depthwise": ({"in_channels": 6, "out_channels": 6, "kernel_size": 7, "padding": 3, "groups": 6}, (2, 6, 8, 7)),
    "depthwise-multiplied": ({"in_channels": 4, "out_channels": 8, "kernel_size": 3, "groups": 4}, (2, 4, 6, 5)),
}
# Where it is wrong or stops: compared with the slow reference alone.
BEYOND = {
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilation-tuple": {"kernel_size": (3, 2), "dilation": (2, 3), "stride": (1, 2), "padding": (1, 2)},
    "dilation-groups": {"kernel_size": 3, "dilation": (1, 2), "padding": 1, "groups": 2},
    "wide-padding": {"kernel_size": 3, "padding": (2, 3)},
    "padding-of-1x1": {"kernel_size": 1, "padding": 1, "stride": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same-even": {"kernel_size": (2, 4), "padding": "same"},
    "same-dilation": {"kernel_size": (3, 2), "dilation": (2, 1), "padding": "same", "groups": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": (3, 1), "padding": (2, 1), "padding_mode": "replicate", "groups": 2},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "stride": 2},
    "reflect-same-even": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
}
BS_AND_MAX_OUTS = [(1, 1), (1, 2), (1.25, 2), (2, 1), (2, 2), (2.5, 3)]
MODES = ["train", "eval", "explanation"]


def set_mode(layer: nn.Module, mode: str) -> None:
    layer.train(mode == "train")
    layer.set_explanation_mode(mode == "explanation")


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and the gradients of input and weight under a fixed random cotangent."""
    x = x.clone().requires_grad_()
    out = layer(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), *torch.autograd.grad(out, [x, layer.linear.weight], cotangent.to(out.dtype))


@pytest.mark.parametrize("case", SHARED)
def test_has_the_geometry_attributes_of_the_official_layer(case):
    kwargs, shape = SHARED[case]
    ours, official = BcosConv2d(**kwargs, max_out=2), OfficialBcosConv2d(**kwargs, max_out=2)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "patch_size"):
        assert getattr(ours, name) == getattr(official, name), name
    x = torch.randn(shape)
    norms = official.calc_patch_norms(x)
    assert_near(ours.calc_patch_norms(x).expand_as(norms), norms, 1e-5, "norms")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("b", "max_out"), BS_AND_MAX_OUTS)
@pytest.mark.parametrize("case", SHARED)
def test_equals_official(case, b, max_out, mode):
    kwargs, shape = SHARED[case]
    torch.manual_seed(0)
    official = OfficialBcosConv2d(**kwargs, b=b, max_out=max_out)
    torch.manual_seed(0)
    ours = BcosConv2d(**kwargs, b=b, max_out=max_out)
    assert ours.state_dict().keys() == official.state_dict().keys()
    assert torch.equal(ours.linear.weight, official.linear.weight), "another initialisation under the same seed"
    set_mode(ours, mode)
    set_mode(official, mode)
    x = torch.randn(shape)
    results = zip(run(ours, x), run(official, x), ("output", "dx", "dw"), (1e-5, 1e-4, 1e-4), strict=True)
    for mine, reference, what, tolerance in results:
        assert_near(mine, reference, tolerance, what)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize(("b", "max_out"), BS_AND_MAX_OUTS[1:4])
@pytest.mark.parametrize("case", [*SHARED, *BEYOND])
def test_equals_slow_reference(case, b, max_out, explain):
    if case in SHARED:
        kwargs, shape = SHARED[case]
    else:
        kwargs, shape = dict(in_channels=4, out_channels=6, **BEYOND[case]), (2, 4, 9, 8)
    torch.manual_seed(0)
    layer = BcosConv2d(**kwargs, b=b, max_out=max_out, dtype=torch.float64)
    layer.set_explanation_mode(explain)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = layer.linear.weight
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    geometry = {name: kwargs[name] for name in names if name in kwargs}
    out = layer(x)
    reference = slow_bcos_conv2d(x, weight, **geometry, b=b, max_out=max_out, explain=explain)
    assert_near(out.detach(), reference.detach(), 1e-12)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x, weight], cotangent)
    theirs = torch.autograd.grad(reference, [x, weight], cotangent)
    assert_near(ours[0], theirs[0], 1e-10, "dx")
    assert_near(ours[1], theirs[1], 1e-10, "dw")


@pytest.mark.parametrize(("b", "max_out"), BS_AND_MAX_OUTS)
def test_gradient_in_explanation_mode_is_the_linear_map(b, max_out):
    torch.manual_seed(0)
    net = nn.Sequential(
        BcosConv2d(6, 8, 3, stride=2, padding=1, b=b, max_out=max_out, groups=2),
        BcosConv2d(8, 2, 3, padding="same", dilation=2, b=b, max_out=max_out),
    ).double()
    for layer in net:
        layer.set_explanation_mode()
    x = torch.rand(3, 6, 9, 9, dtype=torch.float64, requires_grad=True)
    out = net(x)
    for unit in range(out[0].numel()):
        values = out.flatten(1)[:, unit]
        (linear_map,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
        assert_near((linear_map * x).sum((1, 2, 3)).detach(), values.detach(), 1e-10)


@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("b", [1.5, 2, 2.5])
def test_gradcheck_twice(b, learnable):
    torch.manual_seed(0)
    given = nn.Parameter(torch.tensor(float(b), dtype=torch.float64)) if learnable else b
    layer = BcosConv2d(2, 1, (1, 3), stride=(1, 2), padding=1, b=given, max_out=2, dtype=torch.float64)
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)


def test_linear_map_can_be_differentiated_again():
    """A loss on W(x) has the gradient that finite differences give, the scale being a constant."""
    torch.manual_seed(0)
    layer = BcosConv2d(3, 2, 3, padding=1, b=1.5, max_out=2, dtype=torch.float64)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    layer.set_explanation_mode()
    (linear_map,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(linear_map.square().sum(), layer.linear.weight)

    weight = layer.linear.weight.detach()
    scale = slow_bcos_conv2d(x, weight, b=1.5, padding=1, max_out=2) / slow_bcos_conv2d(x, weight, 1, 1, b=1, max_out=2)
    scale = scale.detach()

    def loss(weight):
        (linear_map,) = torch.autograd.grad((slow_bcos_conv2d(x, weight, 1, 1, b=1, max_out=2) * scale).sum(), x)
        return linear_map.square().sum()

    direction, step = torch.randn_like(weight), 1e-6
    difference = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    assert_near((gradient * direction).sum(), difference, 1e-6)


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize("b", [1, 1.1, 1.5, 2, 3.7])
def test_zero_patches_are_finite(b, explain):
    torch.manual_seed(0)
    layer = BcosConv2d(6, 4, 3, padding=1, b=b, max_out=2)
    layer.set_explanation_mode(explain)
    x = torch.rand(2, 6, 8, 8)
    x[0] = 0
    x[1, :, :5] = 0
    for result in run(layer, x):
        assert torch.isfinite(result).all()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), layer.linear.weight)
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("b", [1.25, 2])
def test_autocast_keeps_the_norms_in_float32(b, dilation, dtype):
    """300² is beyond float16, and so is the 1e-6 under the root at the other end."""
    torch.manual_seed(0)
    layer = BcosConv2d(16, 8, 3, padding=dilation, dilation=dilation, b=b, max_out=2)
    x = torch.randn(2, 16, 9, 9)
    x[:, :, :, 0], x[:, :, :, 3:] = 300.0, 0.0
    reference = layer(x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.float().square().mean(), x)
    assert torch.isfinite(gradient).all()
    assert_near(out.detach(), reference.detach(), 4e-3 if dtype == torch.float16 else 3e-2)


def test_half_precision_layer():
    torch.manual_seed(0)
    layer = BcosConv2d(16, 8, 3)
    x = torch.full((1, 16, 5, 5), 300.0)
    reference = layer(x)
    assert_near(layer.bfloat16()(x.bfloat16()).detach(), reference.detach(), 3e-2)


def test_learnable_b():
    torch.manual_seed(0)
    b = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    layer = BcosConv2d(3, 4, 3, b=b, dtype=torch.float64)
    assert layer.b is b
    assert set(layer.state_dict()) == {"b", "linear.weight"}
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    out, reference = layer(x), slow_bcos_conv2d(x, layer.linear.weight, b=b)
    (ours,), (theirs,) = torch.autograd.grad(out.sum(), b), torch.autograd.grad(reference.sum(), b)
    assert_near(out.detach(), reference.detach(), 1e-12)
    assert_near(ours, theirs, 1e-10)
    layer.set_explanation_mode()
    x.requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), b, allow_unused=True) == (None,), "the scale is to be a constant"


def test_learnable_b_stays_at_1_and_can_come_back():
    torch.manual_seed(0)
    b = nn.Parameter(torch.tensor(1.0))
    layer = BcosConv2d(3, 4, 3, b=b)
    x = torch.randn(2, 3, 5, 5)
    at_1 = layer(x)
    with torch.no_grad():
        b.fill_(0.5)
    assert torch.equal(layer(x), at_1)
    assert torch.autograd.grad(layer(x).square().sum(), b)[0] != 0


def test_b_per_layer():
    net = nn.Sequential(BcosConv2d(3, 4, b=1), BcosConv2d(4, 4, b=1.5), BcosConv2d(4, 2, b=2.5))
    assert [layer.b for layer in net] == [1, 1.5, 2.5]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"b": 0.99}, ValueError, r"b=0\.99"),
        ({"b": float("nan")}, ValueError, "b=nan"),
        ({"b": float("inf")}, ValueError, "b=inf"),
        ({"b": nn.Parameter(torch.tensor(0.5))}, ValueError, r"b=0\.5"),
        ({"b": nn.Parameter(torch.ones(3))}, ValueError, "scalar"),
        ({"b": torch.tensor(2.0)}, ValueError, "Parameter"),
        ({"max_out": 0}, ValueError, "max_out=0"),
        ({"groups": 2, "max_out": 2}, ValueError, "out_channels=3"),
        ({"padding_mode": "zero"}, ValueError, "padding_mode"),
        ({"padding": "sam"}, ValueError, "sam"),
        ({"pading": 1}, TypeError, "pading"),
        ({"scale": 1}, TypeError, "scale"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        BcosConv2d(4, 3, 3, **kwargs)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"\(4, 5, 5\)"):
        BcosConv2d(4, 3, 3)(torch.rand(4, 5, 5))


def test_has_no_bias_unless_asked_for():
    assert BcosConv2d(4, 3, 3).linear.bias is None


@pytest.mark.parametrize("options", [{"bias": True}, {"normalize_weight": False}], ids=str)
@pytest.mark.parametrize("b", [1, 1.5, 2])
def test_options_for_networks_under_conversion(options, b):
    torch.manual_seed(0)
    layer = BcosConv2d(4, 6, 3, padding=1, b=b, max_out=2, dtype=torch.float64, **options)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    weight, bias = layer.linear.weight, layer.linear.bias
    if layer.normalize_weight:
        weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    out = torch.nn.functional.conv2d(x, weight, bias, padding=1).unflatten(1, (6, 2)).amax(2)
    norm = (torch.nn.functional.conv2d(x.square(), torch.ones_like(weight[:1]), padding=1) + 1e-6).sqrt()
    scale = 1 if b == 1 else out.abs() / norm if b == 2 else ((out / norm).abs() + 1e-6) ** (b - 1)
    assert_near(layer(x).detach(), (out * scale).detach(), 1e-12)


def test_in_explanation_mode_the_output_is_linear_up_to_the_bias():
    torch.manual_seed(0)
    layer = BcosConv2d(4, 6, 3, bias=True, normalize_weight=False, dtype=torch.float64)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    layer.set_explanation_mode()
    out = layer(x)
    (weights,) = torch.autograd.grad(out[0, 0, 0, 0], x, retain_graph=True)
    (share,) = torch.autograd.grad(out[0, 0, 0, 0], layer.linear.bias)
    assert_near((weights * x).sum() + (share * layer.linear.bias).sum(), out[0, 0, 0, 0], 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("max_out", [1, 2])
def test_channels_last(groups, max_out):
    torch.manual_seed(0)
    layer = BcosConv2d(4, 8, 3, padding=1, groups=groups, max_out=max_out)
    x = torch.randn(2, 4, 6, 5)
    out = copy.deepcopy(layer).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out.detach(), layer(x).detach(), 1e-5)


def test_copies_and_pickles():
    layer = BcosConv2d(4, 8, 3, b=nn.Parameter(torch.tensor(1.5)), max_out=2)
    layer.set_explanation_mode()
    x = torch.rand(1, 4, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.is_in_explanation_mode
        assert torch.equal(other(x), layer(x))


def test_leaves_the_input_alone():
    x = torch.rand(1, 4, 5, 5)
    before = x.clone()
    BcosConv2d(4, 8, 3, b=1.5, max_out=2)(x)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("kwargs", [{}, {"b": 1.5, "dilation": 2}, {"groups": 2, "max_out": 2}], ids=str)
def test_compiles_as_one_graph(kwargs):
    torch.manual_seed(0)
    layer = BcosConv2d(4, 8, 3, padding=1, **kwargs)
    x = torch.rand(2, 4, 7, 7)
    expected = run(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mine, reference in zip(run(compiled, x), expected, strict=True):
        assert_near(mine, reference, 1e-5)


def test_normed_conv_has_unit_weights_and_may_have_a_bias():
    torch.manual_seed(0)
    layer = NormedConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    reference = slow_bcos_conv2d(x, layer.weight, b=1) + layer.bias.view(1, -1, 1, 1)
    assert_near(layer(x).detach(), reference.detach(), 1e-5)


def test_repr_names_b_and_max_out():
    assert "B=1.5, max_out=2" in repr(BcosConv2d(3, 4, b=1.5, max_out=2))
    assert "B=learnable" in repr(BcosConv2d(3, 4, b=nn.Parameter(torch.tensor(2.0))))
