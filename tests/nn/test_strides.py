"""Memory layout of outputs: code written for the official modules calls ``view`` on them."""

import bcos.modules as official
import pytest
import torch
from bcos.modules.norms import centered_norms, uncentered_norms
from torch import nn

from bcos_train import nn as ours
from bcos_train.nn import fast
from bcos_train.nn.functional import normalize_weight

NORMS = [name for name in ours.__all__ if hasattr(centered_norms, name) or hasattr(uncentered_norms, name)]
LAYERS = {
    "conv": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3}),
    "conv MaxOut": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "max_out": 2}),
    "conv B=1.25": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "b": 1.25}),
    "linear MaxOut": ("BcosLinear", {"in_features": 5, "out_features": 8, "max_out": 2}),
    **{name: (name, {}) for name in NORMS},
}


def build(package: object, name: str, options: dict[str, object]) -> nn.Module:
    kind = next(
        getattr(module, name)
        for module in (package, centered_norms, uncentered_norms)
        if module is not None and hasattr(module, name)
    )
    if options:
        return kind(**options)
    return kind(5) if name == "DetachableLayerNorm" else kind(*(2, 8) if "Group" in name else (8,))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_strides_for_contiguous_input_are_the_official_ones(layer: str, detach: bool) -> None:
    """Also of a centered position norm, which returns channels-last tensors in both, except in explanation mode."""
    x = torch.randn(2, 8, 4, 5)
    strides = []
    for package in (ours, official):
        module = build(package, *LAYERS[layer]).eval()
        module.set_explanation_mode(detach)  # type: ignore[operator]
        strides.append(module(x).stride())
    assert strides[0] == strides[1]


def gradients(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(x), [x, *module.parameters()], grad))


@pytest.mark.parametrize("axes", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("layer", LAYERS)
def test_expanded_inputs_and_gradients(layer: str, axes: tuple[int, ...]) -> None:
    """Derivatives of sums and means are expanded tensors, whose elements share memory."""
    module = build(ours, *LAYERS[layer]).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    shape = module(x).shape
    grad = torch.randn([1 if i in axes else n for i, n in enumerate(shape)], dtype=torch.float64).expand(shape)
    images = x[:, :1, :1].expand_as(x)
    for image, gradient in ((x, grad), (images, grad), (images, grad.contiguous())):
        expected = gradients(module, image.contiguous(), gradient.contiguous())
        for a, b in zip(gradients(module, image, gradient), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axes", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_expanded_gradients_of_unit_weights(memory_format: torch.memory_format, axes: tuple[int, ...]) -> None:
    layer = ours.BcosConv2d(4, 6, 3).to(memory_format=memory_format).linear
    shape = layer.weight.shape
    grad = torch.randn([1 if i in axes else n for i, n in enumerate(shape)]).expand(shape)
    (actual,) = torch.autograd.grad(fast.unit_weight(layer), layer.weight, grad)
    (expected,) = torch.autograd.grad(normalize_weight(layer.weight), layer.weight, grad)
    torch.testing.assert_close(actual, expected)
