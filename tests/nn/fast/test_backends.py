"""The fused operations against the plain ones that define them."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bcos_train.nn import (
    BACKENDS,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    Linear,
    NoBias,
    set_backend,
)
from bcos_train.nn.backend import Backend

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "1x1 strided": {"stride": 2},
    "1x1 padded": {"padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "without padding": {"kernel_size": 3},
    "not square": {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "groups of one unit": {"kernel_size": 3, "padding": 1, "groups": 2, "out_channels": 2},
    "depthwise": {"kernel_size": 7, "padding": 3, "groups": 8},
    "depthwise strided": {"kernel_size": 7, "padding": 3, "groups": 8, "stride": (2, 3)},
    "large and grouped": {"kernel_size": (5, 7), "padding": (1, 3), "groups": 2, "stride": 2},
    "MaxOut": {"kernel_size": 3, "padding": 1, "max_out": 2},
    "MaxOut of groups": {"kernel_size": 3, "padding": 1, "max_out": 3, "groups": 4},
    "b=1": {"kernel_size": 3, "b": 1},
    "b=1.25": {"kernel_size": 3, "padding": 1, "b": 1.25},
    "b=2.5 MaxOut": {"kernel_size": 3, "padding": 1, "b": 2.5, "max_out": 2},
    # Without a fused operation of their own:
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "wide padding": {"kernel_size": 3, "padding": 2},
}


def conv(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> BcosConv2d:
    return BcosConv2d(8, **{"out_channels": 8, **options}).to(dtype)


def image(dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(2, 8, 12, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x[0, :, :4, :4] = 0  # patches of nothing
    return x.contiguous(memory_format=layout).requires_grad_()


def twins(layer: nn.Module, backend: Backend = "fused") -> tuple[nn.Module, nn.Module]:
    """A copy that computes with the plain operations, and one with the backend."""
    plain, fast = copy.deepcopy(layer), copy.deepcopy(layer)
    set_backend(plain, "reference")
    set_backend(fast, backend)
    return plain, fast


def gradients(layer: nn.Module, x: Tensor, create_graph: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of input and parameters for a random gradient of the output."""
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return out, list(torch.autograd.grad(out, [x, *layer.parameters()], grad, create_graph=create_graph))


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float64, (1e-13, 1e-12)), (torch.float32, (1e-5, 1e-4))])
def test_convolution(
    options: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    plain, fast = twins(conv(options, dtype))
    x = image(dtype, layout)
    expected, expected_grads = gradients(plain, x)
    out, grads = gradients(fast, x)
    assert_close(out, expected, tolerances[0])
    assert out.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, tolerances[1])


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_twice_differentiated(options: dict[str, Any]) -> None:
    results = []
    for layer in twins(conv(options)):
        x = image()
        (inner,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(inner.square().sum(), [x, *layer.parameters()]))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize("name", ["3x3 strided", "groups", "depthwise", "MaxOut", "b=1.25"])
def test_gradcheck(name: str) -> None:
    layer = conv(CONVOLUTIONS[name])
    x = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    weight = layer.linear.weight

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"linear.weight": weight}, x)

    assert torch.autograd.gradcheck(call, (x, weight))


PRECISIONS = [(torch.float64, (1e-13, 1e-11)), (torch.float32, (1e-5, 1e-4))]


@pytest.mark.parametrize(("dtype", "tolerances"), PRECISIONS)
@pytest.mark.parametrize("b", [2, 1.5])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (6,), (0, 6)], ids=str)
def test_linear(
    shape: tuple[int, ...], max_out: int, b: float, dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    plain, fast = twins(BcosLinear(6, 5, b=b, max_out=max_out).to(dtype))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    if len(shape) > 1:
        x[:1] = 0
    x.requires_grad_()
    (expected, expected_grads), (out, grads) = gradients(plain, x), gradients(fast, x)
    if not x.numel():
        assert out.shape == expected.shape
        return
    assert_close(out, expected, tolerances[0])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, tolerances[1])


@pytest.mark.parametrize(("dtype", "tolerances"), PRECISIONS)
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (6,)], ids=str)
def test_plain_linear(shape: tuple[int, ...], dtype: torch.dtype, tolerances: tuple[float, float]) -> None:
    layer = Linear(6, 5, bias=False).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=dtype).requires_grad_()
    expected, expected_grads = gradients(layer, x)
    reference = nn.Linear(6, 5, bias=False).to(dtype)
    reference.load_state_dict(layer.state_dict())
    out, grads = gradients(reference, x)
    assert_close(out, expected, tolerances[0])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, tolerances[1])


def test_plain_linear_twice_differentiated() -> None:
    layer = Linear(6, 5, bias=False).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_plain_linear_with_bias_and_under_autocast() -> None:
    x = torch.randn(4, 6)
    layer = Linear(6, 5)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(6, 5, bias=False)(x).dtype == torch.bfloat16


def test_operations_are_counted() -> None:
    """What counts operations doesn't know of oneDNN's product."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        BcosLinear(6, 5)(torch.randn(4, 6))
    assert counter.get_total_flops() == 2 * 4 * 6 * 5


def test_layers_work_outside_inference_mode_after_it() -> None:
    """Memory that is used again must not belong to inference mode."""
    layer, x = BcosConv2d(6, 8, 3), torch.rand(2, 6, 9, 9)

    def call() -> None:  # in a thread, which has no such memory yet
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
    assert layer.linear.weight.grad is not None


def test_many_samples_in_several_parts() -> None:
    """What is done part by part to save memory."""
    layer = BcosConv2d(3, 16, 3, padding=1)
    plain, fast = twins(layer)
    x = torch.rand(5, 3, 256, 256)
    with torch.no_grad():
        assert_close(fast(x), plain(x), 1e-5)
        assert_close(fast(x.to(memory_format=torch.channels_last)), plain(x), 1e-5)
    plain, fast = twins(BcosLinear(3000, 1000))
    x = torch.rand(2, 3000).requires_grad_()
    assert_close(gradients(fast, x)[1][1], gradients(plain, x)[1][1], 1e-4)


@pytest.mark.parametrize("wrap", [NoBias, lambda make: lambda c: make(c, affine=False)], ids=["weight", "unaffine"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float64, (1e-13, 1e-11)), (torch.float32, (1e-5, 1e-4))])
def test_uncentered_batch_norm(
    wrap: Callable[..., Any], layout: torch.memory_format, dtype: torch.dtype, tolerances: tuple[float, float]
) -> None:
    norm = wrap(BatchNormUncentered2d)(8).to(dtype)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    plain, fast = twins(norm)
    x = (image(dtype, layout).detach() + 1).requires_grad_()
    (expected, expected_grads), (out, grads) = gradients(plain, x), gradients(fast, x)
    assert_close(out, expected, tolerances[0])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, tolerances[1])
    for (name, ours), theirs in zip(fast.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5), name
    with torch.no_grad():
        assert_close(fast.eval()(x), plain.eval()(x), tolerances[0])


def test_uncentered_batch_norm_twice_differentiated() -> None:
    results = []
    for norm in twins(NoBias(BatchNormUncentered2d)(8).double()):
        x = image()
        (inner,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(inner.square().sum(), [x, *norm.parameters()]))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize("make", [lambda: conv(CONVOLUTIONS["MaxOut"]), lambda: conv(CONVOLUTIONS["b=1.25"])])
def test_only_what_is_needed_is_differentiated(make: Callable[[], BcosConv2d]) -> None:
    layer, x = make(), image()
    set_backend(layer, "fused")
    (grad_x,) = torch.autograd.grad(layer(x).sum(), x)
    (grad_weight,) = torch.autograd.grad(layer(x.detach()).sum(), layer.linear.weight)
    both = torch.autograd.grad(layer(x).sum(), [x, layer.linear.weight])
    assert torch.equal(grad_x, both[0])
    assert torch.equal(grad_weight, both[1])


# Memory: what autograd keeps for the backward pass.


def kept_elements(layer: nn.Module, x: Tensor) -> int:
    """Elements of all distinct tensors that the graph of a forward pass keeps, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert out.requires_grad
    return sum(kept.values())


def test_a_convolution_keeps_input_and_output_alone() -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    layer = BcosConv2d(8, 32, 3, padding=1)
    set_backend(layer, "fused")
    weights, norms = 2 * layer.linear.weight.numel() + 32, 2 * 16 * 16
    assert kept_elements(layer, x) <= x.numel() + 2 * 32 * 16 * 16 + norms + weights
    set_backend(layer, "reference")
    assert kept_elements(layer, x) > 2 * (x.numel() + 2 * 32 * 16 * 16)


# Surroundings.


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        BcosConv2d(6, 8, 3, padding=1),
        NoBias(BatchNormUncentered2d)(8),
        BcosConv2d(8, 8, 3, stride=2, padding=1, max_out=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        BcosLinear(8, 4),
    )


def net_input(seed: int = 5) -> Tensor:
    return torch.rand(3, 6, 9, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_kernels(mode: str) -> None:
    plain, fast = twins(small_net().train(mode == "train"), "compiled")
    x = net_input()
    expected, expected_grads = gradients(plain, x.requires_grad_())
    out, grads = gradients(fast, x)
    assert_close(out, expected, 1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_autocast(backend: Backend) -> None:
    net, x = small_net().eval(), net_input()
    expected = net(x)
    set_backend(net, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
        assert net[0](x).dtype == torch.bfloat16
    assert_close(out.float(), expected, 0.05)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_whole_model_compiled() -> None:
    net, x = small_net().eval(), net_input()
    fast = copy.deepcopy(net)
    fast.compile(backend="aot_eager", fullgraph=True)
    expected, expected_grads = gradients(net, x.requires_grad_())
    out, grads = gradients(fast, x)
    assert_close(out, expected, 1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ours, theirs, 1e-4)


def test_export() -> None:
    net, x = small_net().eval(), net_input()
    assert_close(torch.export.export(net, (x,)).module()(x), net(x), 1e-5)


def test_transforms_of_functions() -> None:
    net, x = small_net().eval().double(), net_input().double()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: net(image[None])[0]))(x)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda image: net(image[None])[0], one) for one in x])
    assert_close(jacobian, expected, 1e-10)


def test_deterministic_mode() -> None:
    net, x = small_net(), net_input().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (gradients(copy.deepcopy(net), x)[1] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_hooks_of_the_linear_map_are_called() -> None:
    layer, seen = conv({}), []
    layer.linear.register_forward_hook(lambda module, args, out: seen.append(out))
    layer(image())
    assert len(seen) == 1


def test_learnable_b() -> None:
    b = nn.Parameter(torch.tensor(1.5))
    layer = BcosConv2d(8, 4, 3, b=b)
    layer(image(torch.float32)).sum().backward()
    assert b.grad is not None


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend='fusde'; did you mean fused\?: one of fused, compiled, reference"):
        set_backend(small_net(), "fusde")  # type: ignore[arg-type]


def test_forward_mode_differentiation() -> None:
    layer, x, tangent = BcosConv2d(3, 4, 3).double(), *torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    expected = torch.func.jvp(layer, (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_values_in_float16(backend: Backend) -> None:
    """Outputs of 1e-5 and less, of which float16 knows few digits or none."""
    torch.manual_seed(0)
    layer = BcosConv2d(16, 16, 3, padding=1)
    set_backend(layer, backend)
    x, grad = 1e-4 * torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    inputs = (x.requires_grad_(), layer.linear.weight)
    expected = torch.autograd.grad(layer(x), inputs, grad)
    with torch.autocast("cpu", dtype=torch.float16):
        out = layer(x)
    for ours, theirs in zip(torch.autograd.grad(out.float(), inputs, grad), expected, strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()
