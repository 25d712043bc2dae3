"""The uncentered batch norm from torch's CUDA kernels, with their formulas in the place of the kernels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train.nn import BatchNormUncentered2d, NoBias, set_backend
from bcos_train.nn.fast import gpu_batch_norm as batch_norm
from bcos_train.nn.fast import gpu_device as device

WEIGHTS = pytest.mark.parametrize("affine", [True, False], ids=["weight", "unaffine"])
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def as_map(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class NativeKernels:
    """What ATen's Normalization.cuh computes, and what it demands of its arguments."""

    def batch_norm_update_stats(self, x: Tensor, running_mean: None, running_var: None, momentum: float) -> Any:
        assert running_mean is None
        assert running_var is None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)

    def batch_norm_elemt(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
    ) -> Tensor:
        self.check(x, weight, mean, inverse)
        out = (x - as_map(mean)) * as_map(inverse)
        out = out if weight is None else out * as_map(weight)
        return (out if bias is None else out + as_map(bias)).to(x.dtype)

    def batch_norm_backward_reduce(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        weight: Tensor | None,
        input_g: bool,
        weight_g: bool,
        bias_g: bool,
    ) -> tuple[Tensor | None, ...]:
        self.check(x, weight, mean, inverse)
        assert grad.stride() == x.stride()
        wide = grad.to(mean.dtype)
        sum_dy, sum_dy_xmu = wide.sum((0, 2, 3)), (wide * (x - as_map(mean))).sum((0, 2, 3))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * inverse if weight_g else None, sum_dy if bias_g else None

    def batch_norm_backward_elemt(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        weight: Tensor | None,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
        count: Tensor,
    ) -> Tensor:
        self.check(x, weight, mean, inverse)
        assert grad.stride() == x.stride()
        assert count.dtype == torch.int32
        share = 1 / int(count.sum())
        slope = inverse.square() * sum_dy_xmu * share
        grad_x = (grad - as_map(sum_dy * share) - (x - as_map(mean)) * as_map(slope)) * as_map(inverse)
        return (grad_x if weight is None else grad_x * as_map(weight)).to(x.dtype)

    def check(self, x: Tensor, weight: Tensor | None, *statistics: Tensor) -> None:
        assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        for values in (*statistics, *([] if weight is None else [weight])):
            assert values.dtype == torch.promote_types(x.dtype, torch.float32)


@pytest.fixture(autouse=True)
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "GPU_TYPES", {"cpu"})
    monkeypatch.setattr(batch_norm, "uses_triton", lambda x: False)
    for name in dir(NativeKernels):
        if name.startswith("batch_norm_"):
            monkeypatch.setattr(torch, name, getattr(NativeKernels(), name))


def make(affine: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norm = NoBias(BatchNormUncentered2d)(5) if affine else BatchNormUncentered2d(5, affine=False)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    return norm.to(dtype)


def results(norm: nn.Module, x: Tensor, grad: Tensor, backend: Any) -> list[Tensor]:
    norm = copy.deepcopy(norm)
    set_backend(norm, backend)
    x = x.detach().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad(out, [x, *norm.parameters()], grad), norm.running_var]


@WEIGHTS
@LAYOUTS
def test_equals_autograd_of_the_plain_operations(affine: bool, layout: torch.memory_format) -> None:
    norm = make(affine)
    x = (torch.randn(3, 5, 4, 6, dtype=torch.float64) + 1).contiguous(memory_format=layout)
    grad = torch.randn(x.shape, dtype=torch.float64)
    for ours, expected in zip(results(norm, x, grad, "fused"), results(norm, x, grad, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@WEIGHTS
@LAYOUTS
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_stays_bfloat16(affine: bool, layout: torch.memory_format, parameter_dtype: torch.dtype) -> None:
    norm = make(affine, parameter_dtype)
    x = (torch.randn(3, 5, 4, 6) + 1).bfloat16().contiguous(memory_format=layout)
    grad = torch.randn(x.shape).bfloat16()
    found = results(norm, x, grad, "fused")
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    expected = results(make(affine, parameter_dtype).double(), x.double(), grad.double(), "reference")
    for ours, reference in zip(found, expected, strict=True):
        assert (ours.double() - reference).norm() <= 5e-3 * reference.norm()


def test_tensors_of_another_layout() -> None:
    norm = make(True)
    x = torch.randn(3, 5, 4, 12, dtype=torch.float64)[..., ::2]
    grad = torch.randn(3, 4, 5, 6, dtype=torch.float64).transpose(1, 2)
    for ours, expected in zip(results(norm, x, grad, "fused"), results(norm, x, grad, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_differentiated_twice_and_without_the_gradient_of_the_input() -> None:
    norm, x = make(True), torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm, (x,))
    (grad,) = torch.autograd.grad(norm(x.detach()).square().sum(), norm.weight)
    (expected, _) = torch.autograd.grad(norm(x).square().sum(), (norm.weight, x))
    torch.testing.assert_close(grad, expected)
