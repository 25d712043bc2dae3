"""The Triton kernels in Triton's interpreter, against autograd in float64.

Run by `test_triton_kernels` in a process of its own: whether Triton interprets is settled when it is imported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train.nn import BcosConv2d, BcosLinear, set_backend
from bcos_train.nn.fast import dispatch
from bcos_train.nn.fast import gpu_device as device
from bcos_train.nn.fast import triton_kernels as kernels
from bcos_train.nn.fast.gpu_ops import FEATURE_NORM, PATCH_NORM, SQUARES

ROWS = pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
SIZES = pytest.mark.parametrize("sizes", [(64, 64), (57, 100), (130, 294), (1, 3)], ids=str)
#: Float32 to its rounding, bfloat16 and float16 to that of the result; the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all()
    assert (ours.double() - expected).norm() <= tolerance * expected.norm()


def matrices(count: int, sizes: tuple[int, int], rows: bool, dtype: torch.dtype) -> list[Tensor]:
    """Tensors (B, P, C), or with positions side by side (B, C, P)."""
    torch.manual_seed(0)  # of a random draw, sums of three values may cancel
    positions, channels = sizes
    shape = (1, positions, channels) if rows else (2, channels, positions)
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def kernel_sizes(x: Tensor, rows: bool) -> list[int]:
    return list(x.shape) if rows else [x.shape[0], x.shape[2], x.shape[1]]


@DTYPES
@ROWS
@SIZES
def test_passes_of_a_layer(sizes: tuple[int, int], rows: bool, dtype: torch.dtype) -> None:
    out, grad, x = matrices(3, sizes, rows, dtype)
    axis = 2 if rows else 1
    layout = (kernel_sizes(out, rows), rows)
    norm = out.abs().sum(axis, keepdim=True).float() + 1
    o, n = out.double().requires_grad_(), norm.double().requires_grad_()
    y = o * o.abs() / n
    expected_grad, grad_norm = torch.autograd.grad(y, (o, n), grad.double())
    expected_s = grad_norm / n.detach()
    tolerance = TOLERANCES[dtype]

    found = out.clone()
    kernels.square_(found, norm, *layout)
    assert_near(found, y.detach(), tolerance)
    grad_out, s = kernels.square_backward(grad, out, norm, *layout, True)
    assert_near(grad_out, expected_grad, tolerance)
    assert_near(s, expected_s, 1e-6)
    if dtype != torch.float16:  # whose small outputs do not tell what they come from
        grad_out, s = kernels.square_backward(grad, found, norm, *layout, False)
        assert_near(grad_out, expected_grad, tolerance)
        assert_near(s, expected_s, tolerance)
    expected = grad.double() + x.double() * s.double()
    kernels.add_product_(grad, x, s, *layout)
    assert_near(grad, expected, tolerance)


@DTYPES
@ROWS
@SIZES
def test_sums_of_squares(sizes: tuple[int, int], rows: bool, dtype: torch.dtype) -> None:
    (x,) = matrices(1, sizes, rows, dtype)
    axis = 2 if rows else 1
    x.select(3 - axis, 0).zero_()  # a position of nothing
    squares = x.double().square().sum(axis, keepdim=True)
    expected = {SQUARES: squares, PATCH_NORM: (squares + 1e-6).sqrt()}
    expected[FEATURE_NORM] = torch.where(squares == 0, 1, squares.sqrt() + 1e-12)
    for kind, reference in expected.items():
        found = kernels.sum_of_squares(x, kernel_sizes(x, rows), rows, kind, list(squares.shape))
        assert_near(found, reference, 1e-6)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"),
    [((3, 3), (1, 1), (1, 1)), ((1, 1), (2, 2), (0, 0)), ((7, 7), (2, 2), (3, 3)), ((1, 5), (2, 1), (0, 2))],
    ids=str,
)
def test_windows(kernel_size: Any, stride: Any, padding: Any) -> None:
    squares = torch.rand(3, 1, 15, 14)
    pooled = nn.functional.avg_pool2d(squares.double(), kernel_size, stride, padding, divisor_override=1)
    found = kernels.window_norm(squares, list(kernel_size), list(stride), list(padding))
    assert_near(found, (pooled + 1e-6).sqrt(), 1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (3, 1500), (1, 1)], ids=str)
def test_normalized_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, grad = torch.randn(shape), torch.randn(shape).to(dtype)
    w = weight.double().requires_grad_()
    expected = w / w.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1))
    unit, norm = kernels.normalize(weight, dtype)
    assert unit.dtype == dtype
    assert_near(unit, expected.detach(), TOLERANCES[dtype])
    assert_near(norm, w.detach().flatten(1).norm(dim=1), 1e-6)
    (expected_grad,) = torch.autograd.grad(expected, w, grad.double())
    found = kernels.normalize_backward(grad, weight, norm)
    assert (found - expected_grad).norm() <= 1e-6 * grad.norm() / norm.min()


def test_batch_norm_constants() -> None:
    inverse, zeros, count = kernels.batch_norm_constants(var := torch.rand(600), 1e-5, 12345)
    assert_near(inverse, torch.rsqrt(var.double() + 1e-5), 1e-6)
    assert not zeros.any()
    assert count.tolist() == [12345]


# Whole layers.


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers use the interpreted kernels; their names as they are called."""
    for module in (device, dispatch):
        monkeypatch.setattr(module, "GPU_TYPES", {"cpu"})
    names: list[str] = []

    def record(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
        names.append(name)
        return kernel(*args)

    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, partial(record, name, getattr(kernels, name)))
    return names


LAYERS = {
    "1x1": lambda: BcosConv2d(6, 8),
    "1x1 strided": lambda: BcosConv2d(6, 8, stride=2),
    "3x3": lambda: BcosConv2d(6, 8, 3, padding=1),
    "7x7 strided": lambda: BcosConv2d(6, 8, 7, stride=2, padding=3),
    "MaxOut": lambda: BcosConv2d(6, 8, 3, padding=1, max_out=2),
    "groups": lambda: BcosConv2d(6, 8, 3, padding=1, groups=2),
    "depthwise": lambda: BcosConv2d(6, 6, 3, padding=1, groups=6),
    "b=1.5": lambda: BcosConv2d(6, 8, 3, b=1.5),
    "linear": lambda: BcosLinear(7, 5),
    "linear MaxOut": lambda: BcosLinear(7, 5, max_out=2),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(called: list[str], name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    if isinstance(layer, BcosConv2d):
        layer = layer.to(memory_format=layout)
        x = torch.randn(2, 6, 8, 9).to(dtype).contiguous(memory_format=layout)
    else:
        x = torch.randn(2, 3, 7).to(dtype)
    reference = LAYERS[name]().double()
    reference.load_state_dict(layer.state_dict())
    set_backend(reference, "reference")
    x.requires_grad_()
    out = layer(x)
    grad = torch.randn(out.shape).to(dtype)
    wide = x.detach().double().requires_grad_()
    expected = reference(wide)
    found = [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)]
    exact = [expected.detach(), *torch.autograd.grad(expected, [wide, *reference.parameters()], grad.double())]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    if "MaxOut" in name and dtype == torch.bfloat16:
        tolerance = 0.1  # of nearly equal candidates rounding chooses another one
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, theirs, tolerance)
    if name in ("1x1", "3x3", "linear", "MaxOut") and dtype != torch.float64:
        assert set(called) >= {"sum_of_squares", "square_", "square_backward", "add_product_", "normalize"}
    if dtype == torch.float64:
        assert called == []


@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_layers_under_autocast_and_differentiated_twice(called: list[str], name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 6, 8, 9) if name == "3x3" else torch.randn(3, 7)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.requires_grad_())
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == torch.bfloat16
    assert_near(out.detach(), expected.detach().double(), 2e-2)
    out.float().sum().backward()
    assert layer.linear.weight.grad.dtype == torch.float32
    results = []
    for backend in ("fused", "reference"):
        set_backend(layer, backend)
        (inner,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(inner.square().sum(), [x, layer.linear.weight]))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs.double(), 1e-5)
