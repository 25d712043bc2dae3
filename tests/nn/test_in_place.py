"""Writing to the output of a layer in place, as ``y += x`` does, gives the same gradients as writing to a copy."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bcos_train.explanation import explanation_mode
from bcos_train.nn import (
    NORM_NAMES,
    Backend,
    BcosConv2d,
    BcosLinear,
    DetachableGELU,
    DetachableLayerNorm,
    Linear,
    LogitLayer,
    NoBias,
    NormedConv2d,
    NormedLinear,
    cached_weights,
    make_norm,
    set_backend,
)

C = 8

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: BcosConv2d(C, C, 3, padding=1),
    "conv 1x1": lambda: BcosConv2d(C, C),
    "conv B=1": lambda: BcosConv2d(C, C, 3, padding=1, b=1),
    "conv B=1.25": lambda: BcosConv2d(C, C, 3, padding=1, b=1.25),
    "conv MaxOut": lambda: BcosConv2d(C, C, 3, padding=1, max_out=2),
    "conv B=1.25 MaxOut": lambda: BcosConv2d(C, C, 3, padding=1, b=1.25, max_out=2),
    "conv groups": lambda: BcosConv2d(C, C, 3, padding=1, groups=2),
    "conv groups MaxOut": lambda: BcosConv2d(C, C, 3, padding=1, groups=2, max_out=2),
    "conv depthwise": lambda: BcosConv2d(C, C, 3, padding=1, groups=C),
    "conv strided": lambda: BcosConv2d(C, C, 3, stride=2, padding=1),
    "conv dilated": lambda: BcosConv2d(C, C, 3, padding=2, dilation=2),
    "conv learnable B": lambda: BcosConv2d(C, C, 3, padding=1, b=nn.Parameter(torch.tensor(1.5))),
    "conv without unit norm": lambda: BcosConv2d(C, C, 3, padding=1, normalize_weight=False),
    "conv with bias": lambda: BcosConv2d(C, C, 3, padding=1, bias=True),
    "normed conv": lambda: NormedConv2d(C, C, 3, padding=1),
    "BcosLinear": lambda: BcosLinear(C, C),
    "BcosLinear B=1.25": lambda: BcosLinear(C, C, b=1.25),
    "BcosLinear MaxOut": lambda: BcosLinear(C, C, max_out=2),
    "BcosLinear B=1.25 MaxOut": lambda: BcosLinear(C, C, b=1.25, max_out=2),
    "Linear": lambda: Linear(C, C, bias=False),
    "NormedLinear": lambda: NormedLinear(C, C, bias=False),
    "LayerNorm": lambda: DetachableLayerNorm(C),
    "LayerNorm without bias": lambda: NoBias(DetachableLayerNorm)(C),
    "GELU": DetachableGELU,
    "LogitLayer": lambda: LogitLayer(2.0, 1.0),
    **{f"norm {name}": partial(make_norm(name), C) for norm in NORM_NAMES for name in (norm, f"{norm}-linear")},
}
#: Those whose saved output is also the output of the layer, for the tests with more variants.
SAVING_OUTPUT = ["conv", "conv groups MaxOut", "BcosLinear MaxOut"]


def assign_slice(y: Tensor) -> Tensor:
    y[:, :2] = 0.5
    return y


def add_no_grad(y: Tensor) -> Tensor:
    """As gradient noise or clipping of activations is written."""
    with torch.no_grad():
        y.add_(0.25)
    return y


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda y: y.__iadd__(0.5 * torch.ones_like(y)),
    "relu": lambda y: F.relu(y, inplace=True),
    "slice": assign_slice,
    "mul": lambda y: y.mul_(3),
    "zero": lambda y: y.zero_(),
    "clamp": lambda y: y.clamp_(-0.1, 0.1),
    "part of a view": lambda y: y.flatten(1)[:, ::2].mul_(2)._base.view_as(y),  # type: ignore[union-attr]
    "without grad": add_no_grad,
}


def build(name: str, backend: Backend = "fused") -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    set_backend(layer, backend)
    return layer


def image(layer: nn.Module, channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, BcosLinear | nn.Linear | nn.LayerNorm):
        return torch.randn(3, 4, C, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(3, C, 6, 5, generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()


def gradients(layer: nn.Module, x: Tensor, write: Callable[[Tensor], Tensor], copy: bool) -> list[Tensor | None]:
    y = layer(x)
    y = write(y.clone() if copy else y)
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True))


def assert_same(layer: nn.Module, x: Tensor, write: Callable[[Tensor], Tensor]) -> None:
    expected, found = (gradients(layer, x, write, copy) for copy in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_training(name: str, operation: str) -> None:
    layer = build(name)
    assert_same(layer, image(layer), OPERATIONS[operation])


@pytest.mark.parametrize("mode", ["eval", "explanation", "cached", "channels_last", "float64", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_modes_and_backends(name: str, mode: str) -> None:
    layer = build(name, "reference" if mode == "reference" else "fused")
    layer.train(mode in ("channels_last", "float64", "reference"))
    dtype = torch.float64 if mode == "float64" else torch.float32
    x = image(layer, mode == "channels_last", dtype)
    layer.to(dtype)
    for write in OPERATIONS.values():
        if mode == "cached":
            with explanation_mode(layer), cached_weights(layer):
                assert_same(layer, x, write)
        elif mode == "explanation":
            with explanation_mode(layer):
                assert_same(layer, x, write)
        else:
            assert_same(layer, x, write)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_compiled_kernels(name: str) -> None:
    layer = build(name, "compiled")
    for write in OPERATIONS.values():
        assert_same(layer, image(layer), write)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer = build(name)
    with torch.autocast("cpu", dtype=dtype):
        for write in OPERATIONS.values():
            assert_same(layer, image(layer), write)


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_residual_sum_of_layers(name: str) -> None:
    """``out += shortcut``, with two layers that both save their outputs."""
    first, second = build(name), build(name)
    x = image(first)
    results = []
    for in_place in (False, True):
        y, shortcut = first(x), second(x)
        if in_place:
            y += shortcut
            shortcut.mul_(2)
        else:
            y, shortcut = y + shortcut, shortcut * 2
        loss = (y.square() + y * shortcut).sum()
        results.append(torch.autograd.grad(loss, [x, *first.parameters(), *second.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    """Non-reentrant checkpointing compares no versions: a modified output must be noticed in the original pass."""
    layer = build(name)
    for write in OPERATIONS.values():

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, write: Callable[[Tensor], Tensor] = write) -> Any:
                return checkpoint(lambda x: write(self.layer(x)), x, use_reentrant=use_reentrant)

        x = image(layer)
        expected = gradients(layer, x, write, copy=True)
        x.grad = None
        layer.zero_grad()
        y = Block()(x)
        (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum().backward()
        for a, b in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_saved_tensor_hooks(name: str) -> None:
    layer = build(name)
    for write in OPERATIONS.values():
        with torch.autograd.graph.save_on_cpu():
            assert_same(layer, image(layer), write)


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_second_derivatives(name: str) -> None:
    layer = build(name)
    x = image(layer)
    results = []
    for copy in (True, False):
        y = layer(x)
        y = F.relu(y.clone() if copy else y, inplace=True)
        (inner,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(inner.square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_writing_between_two_backward_passes(name: str) -> None:
    layer = build(name)
    x = image(layer)
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        y.mul_(2)
    assert torch.equal(*first, *torch.autograd.grad(y.sum(), x))


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_a_modified_input_is_still_an_error(name: str) -> None:
    layer = build(name)
    x = image(layer) * 1
    y = layer(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", SAVING_OUTPUT)
def test_the_output_is_freed_if_hooks_take_over_what_is_saved(name: str) -> None:
    """So that gradient checkpointing and offloading save memory."""
    layer = build(name)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        y = layer(image(layer))
        node, storage = y.grad_fn, weakref.ref(y.untyped_storage())
    del y
    gc.collect()
    assert node is not None
    assert storage() is None


def test_inference_mode() -> None:
    layer = build("conv")
    with torch.inference_mode():
        y = layer(image(layer).detach())
        y += 1
    assert y.is_inference()
