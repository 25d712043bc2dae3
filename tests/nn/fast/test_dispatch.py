"""The decision which code computes a layer: the whole table, and how many files a forward pass reads in."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bcos_train
from bcos_train.nn import (
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    Linear,
    LogitLayer,
    NoBias,
    NormedConv2d,
    cached_weights,
    set_backend,
    why,
)
from bcos_train.nn.fast.dispatch import batch_norm_forward, bcos_conv2d_forward, bcos_linear_forward, linear_forward


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcos_train.nn.backend.Accelerated.backend", "fused")


def explaining(layer: Any) -> Any:
    layer.set_explanation_mode()
    return layer


def hooked(layer: Any) -> Any:
    layer.linear.register_forward_hook(lambda *_: None)
    return layer


def reference(layer: nn.Module) -> nn.Module:
    set_backend(layer, "reference")
    return layer


IMAGE, TOKENS = (2, 4, 6, 6), (2, 3, 4)
#: layer, shape of its input, reason for the definition (None: the fast path)
TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "conv": (lambda: BcosConv2d(4, 4, 3, padding=1), IMAGE, None),
    "conv, options": (lambda: BcosConv2d(4, 4, 3, 2, 1, groups=2, b=1.5, max_out=2), IMAGE, None),
    "conv, own weight": (lambda: BcosConv2d(4, 4, normalize_weight=False), IMAGE, None),
    "conv, reference": (lambda: reference(BcosConv2d(4, 4)), IMAGE, "reference"),
    "conv, hook": (lambda: hooked(BcosConv2d(4, 4)), IMAGE, "hook"),
    "conv, B = 1": (lambda: BcosConv2d(4, 4, b=1), IMAGE, "B = 1"),
    "conv, learnable B": (lambda: BcosConv2d(4, 4, b=nn.Parameter(torch.tensor(2.0))), IMAGE, "learnable"),
    "conv, bias": (lambda: BcosConv2d(4, 4, bias=True), IMAGE, "bias"),
    "conv, explanation": (lambda: explaining(BcosConv2d(4, 4)), IMAGE, "explanation mode"),
    "conv, dilation": (lambda: BcosConv2d(4, 4, 3, dilation=2), IMAGE, "dilation"),
    "conv, reflect": (lambda: BcosConv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "padding"),
    "conv, same": (lambda: BcosConv2d(4, 4, 3, padding="same"), IMAGE, "padding"),
    "conv, wide padding": (lambda: BcosConv2d(4, 4, 3, padding=2), IMAGE, "padding"),
    "linear": (lambda: BcosLinear(4, 3), TOKENS, None),
    "linear, hook": (lambda: hooked(BcosLinear(4, 3)), TOKENS, "hook"),
    "linear, explanation": (lambda: explaining(BcosLinear(4, 3)), TOKENS, "explanation mode"),
    "plain linear": (lambda: Linear(4, 3, bias=False), TOKENS, None),
    "plain linear, bias": (lambda: Linear(4, 3), TOKENS, "bias"),
    "norm": (lambda: NoBias(BatchNormUncentered2d)(4), IMAGE, None),
    "norm, bias": (lambda: BatchNormUncentered2d(4), IMAGE, "bias"),
    "norm, running": (lambda: NoBias(BatchNormUncentered2d)(4).eval(), IMAGE, "running statistics"),
    "norm, explanation": (lambda: explaining(NoBias(BatchNormUncentered2d)(4)), IMAGE, "explanation mode"),
}
FAST: dict[type, Callable[[Any, Tensor], Tensor | None]] = {
    BcosConv2d: bcos_conv2d_forward,
    BcosLinear: bcos_linear_forward,
    Linear: linear_forward,
    BatchNormUncentered2d: batch_norm_forward,
}


@pytest.mark.parametrize(("make", "shape", "reason"), TABLE.values(), ids=TABLE)
def test_table(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str | None) -> None:
    """What `why` says is what happens."""
    layer, x = make(), torch.rand(shape)
    said = why(layer, x)
    is_fast = FAST[type(layer)](layer, x) is not None
    assert said.startswith("fast: " if is_fast else "definition: ")
    assert is_fast == (reason is None)
    assert reason is None or reason in said


def test_operations_depend_on_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BcosConv2d(4, 4), torch.rand(IMAGE)
    assert why(layer, x) == "fast: eager operations, float32 on cpu"
    assert why(Linear(4, 3, bias=False), torch.rand(TOKENS)) == "fast: matrix product, float32 on cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why(layer, x) == "fast: eager operations, bfloat16 on cpu"
        assert why(layer, x.double()) == "fast: eager operations, float64 on cpu"
    explaining(layer)
    with cached_weights(layer):
        assert why(layer, x.requires_grad_()) == "fast: linear map with a constant scale, float32 on cpu"
    monkeypatch.setattr("bcos_train.nn.fast.gpu_device.GPU_TYPES", {"meta"})
    monkeypatch.setattr("bcos_train.nn.fast.dispatch.GPU_TYPES", {"meta"})
    layer = BcosConv2d(4, 4, device="meta")
    assert why(layer, x.to("meta")) == "fast: Triton kernels, float32 on meta"
    assert why(layer, x.to("meta").double()) == "fast: eager operations, float64 on meta"


def test_global_hooks_are_seen() -> None:
    layer, x = BcosConv2d(4, 4), torch.rand(IMAGE)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "global module hook" in why(layer, x)
    finally:
        handle.remove()
    assert why(layer, x).startswith("fast")


def test_cached_weights_open_the_fast_path_to_explanations() -> None:
    layer = explaining(BcosConv2d(4, 4))
    with cached_weights(layer):
        assert why(layer, torch.rand(IMAGE)).startswith("fast")


def test_traced_layers_use_the_definition() -> None:
    layer, answers = BcosConv2d(4, 4), []

    def call(x: Tensor) -> Tensor:
        answers.append(why(layer, x))
        return layer(x)

    torch.func.vmap(call)(torch.rand(1, *IMAGE))
    assert "torch.func" in answers[0]


def test_layers_without_a_fast_path_are_refused() -> None:
    with pytest.raises(ValueError, match="LogitLayer has no fast path"):
        why(LogitLayer(), torch.rand(1))


@contextlib.contextmanager
def files_executed() -> Iterator[set[str]]:
    """The files of this package in which a function is called inside."""
    root, files = str(Path(bcos_train.__file__).parent), set[str]()

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            files.add(str(Path(frame.f_code.co_filename).relative_to(root)))

    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(("backend", "most"), [("reference", 4), ("fused", 6)])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "padding": 1}], ids=["1x1", "3x3"])
def test_a_forward_pass_reads_in_few_files(backend: Any, most: int, options: dict[str, Any]) -> None:
    layer, x = BcosConv2d(4, 4, **options), torch.rand(IMAGE)
    set_backend(layer, backend)
    with files_executed() as files:
        layer(x)
    assert "nn/conv.py" in files
    assert len(files) <= most, sorted(files)


class Doubled(NormedConv2d):
    """A user's replacement of ``linear``, such as an adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OtherNorm(BcosConv2d):
    def input_norm(self, x: Tensor) -> Tensor:
        return 3 * super().input_norm(x)


class OtherPatchNorms(BcosConv2d):
    def calc_patch_norms(self, x: Tensor) -> Tensor:
        return 3 * super().calc_patch_norms(x)


def test_methods_replaced_in_a_layer() -> None:
    x = torch.rand(IMAGE)
    plain = BcosConv2d(4, 4)
    subclass = OtherPatchNorms(4, 4)
    subclass.load_state_dict(plain.state_dict())
    norm, conv = copy.deepcopy(plain), copy.deepcopy(plain)
    norm.input_norm = lambda x: 3 * plain.input_norm(x)  # type: ignore[method-assign]
    conv.linear._conv_forward = lambda *args: 2 * plain.linear(x)  # type: ignore[method-assign]
    for layer, factor in ((subclass, 1 / 3), (norm, 1 / 3), (conv, 4)):
        torch.testing.assert_close(layer(x), factor * plain(x))
        assert "replaced" in why(layer, x)


def test_replaced_parts_are_computed_as_they_are() -> None:
    x = torch.rand(IMAGE)
    replaced = BcosConv2d(4, 4)
    plain = copy.deepcopy(replaced)
    replaced.linear = Doubled(4, 4, 1, bias=False)
    replaced.linear.load_state_dict(plain.linear.state_dict())
    other = OtherNorm(4, 4)
    other.load_state_dict(plain.state_dict())
    for layer, factor in ((replaced, 4), (other, 1 / 3)):  # with B = 2 the output is quadratic in that of `linear`
        torch.testing.assert_close(layer(x), factor * plain(x))
        assert "replaced" in why(layer, x)


def test_float64_stays_float64_under_autocast() -> None:
    layer, x = BcosConv2d(4, 4).double(), torch.rand(IMAGE, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out, layer(x))
