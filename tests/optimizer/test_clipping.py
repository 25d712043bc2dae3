from typing import Any

import pytest
import torch
from bcos.training.agc import adaptive_clip_grad_ as official_clip_
from timm.utils.agc import adaptive_clip_grad as timm_clip_
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bcos_train import create_model
from bcos_train.optimizer import adaptive_clip_grad_, clipping

SHAPES = [
    (8, 4, 3, 3),
    (8, 4, 1, 1),
    (1, 4, 3, 3),
    (8, 4),
    (1, 4),
    (8,),
    (1,),
    (),
    (1, 7, 5),
    (3, 7, 5),
    (3, 1, 5),
    (1, 7, 1),
    (8, 1, 1),
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 1, 8),
    (1, 1),
    (1, 1, 1, 1),
]


@pytest.fixture(autouse=True, params=[False, True], ids=["each parameter alone", "joined"])
def joins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of grouping parameters: a CPU's and an accelerator's."""
    monkeypatch.setattr(clipping, "_joins_on", lambda device: request.param)
    return bool(request.param)


def parameter(shape: tuple[int, ...], gradient_scale: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=generator).requires_grad_()
    # Some units' gradients above the bound, some below.
    sizes = torch.rand(shape[:2] + (1,) * max(len(shape) - 2, 0), generator=generator)
    p.grad = gradient_scale * sizes * torch.randn(shape, generator=generator)
    return p


def twin(p: Tensor) -> Tensor:
    """The same values in the same memory format."""
    copy = p.detach().clone().requires_grad_()
    copy.grad = None if p.grad is None else p.grad.clone()
    return copy


def assert_clips_like_the_official(p: Tensor, clip_factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    ours, official, weight = twin(p), twin(p), p.detach().clone()
    assert ours.grad is not None
    gradient = ours.grad
    adaptive_clip_grad_([ours], clip_factor, eps)
    official_clip_([official], clip_factor, eps)
    assert official.grad is not None
    assert ours.grad is gradient, "written in place"
    assert torch.equal(gradient, official.grad)
    assert torch.equal(ours, weight)
    return gradient


@pytest.mark.parametrize("scale", [1e-4, 0.02, 10.0], ids=["small", "around the bound", "large"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_equal_to_the_official(shape: tuple[int, ...], scale: float) -> None:
    p = parameter(shape, scale)
    assert p.grad is not None
    clipped = assert_clips_like_the_official(p)
    if scale == 10.0:
        assert not torch.equal(clipped, p.grad)
    if scale == 1e-4:
        assert torch.equal(clipped, p.grad)


@pytest.mark.parametrize(("clip_factor", "eps"), [(0.1, 1e-3), (0.01, 5.0), (2.0, 1e-8)])
def test_clip_factor_and_eps(clip_factor: float, eps: float) -> None:
    for shape in SHAPES:
        assert_clips_like_the_official(parameter(shape, 1.0), clip_factor, eps)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 4], ids=str)
def test_channels_last(shape: tuple[int, ...]) -> None:
    p = parameter(shape, 10.0)
    assert p.grad is not None
    p = p.detach().to(memory_format=torch.channels_last).requires_grad_()
    p.grad = parameter(shape, 10.0).grad.to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    clipped = assert_clips_like_the_official(p)
    assert clipped.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(8, 4), (3, 7, 5)], ids=str)
def test_strided_gradients(shape: tuple[int, ...]) -> None:
    p = parameter(shape, 10.0)
    assert p.grad is not None
    p.grad = p.grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not p.grad.is_contiguous()
    assert_clips_like_the_official(p)


@pytest.mark.parametrize("stride", [2, 3])
def test_strided_single_unit(stride: int) -> None:
    """A gradient that is a column of a larger tensor is clipped in place, its neighbors are left alone."""
    storage = torch.ones(8, stride)
    p = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p.grad = storage[:, 1]
    adaptive_clip_grad_([p])
    assert torch.equal(storage[:, 0], torch.ones(8))
    assert torch.allclose(storage[:, 1].norm(), 0.01 * p.detach().norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_gradients_and_zero_weights(shape: tuple[int, ...]) -> None:
    p = parameter(shape, 10.0)
    assert p.grad is not None
    zero_weight = torch.zeros(shape, requires_grad=True)
    zero_weight.grad = p.grad.clone()
    assert assert_clips_like_the_official(zero_weight).abs().max() > 0
    p.grad.zero_()
    assert not assert_clips_like_the_official(p).any()


def test_parameters_without_gradient() -> None:
    with_gradient, without = parameter((8, 4), 10.0), torch.ones(3, requires_grad=True)
    expected = assert_clips_like_the_official(with_gradient)
    adaptive_clip_grad_(iter([without, with_gradient]))
    assert without.grad is None
    assert with_gradient.grad is not None
    assert torch.equal(with_gradient.grad, expected)


def test_units_by_hand() -> None:
    """Row 0 is clipped to 0.1 times its weight's norm of 5, row 1 is within the bound."""
    p = torch.tensor([[3.0, 4.0], [3.0, 4.0]], requires_grad=True)
    p.grad = torch.tensor([[6.0, 8.0], [0.3, 0.0]])
    adaptive_clip_grad_([p], clip_factor=0.1)
    torch.testing.assert_close(p.grad, torch.tensor([[0.3, 0.4], [0.3, 0.0]]))


def timm_units(p: Tensor) -> list[Tensor]:
    """The official units in a form that timm's function takes as such: views with gradients that are views."""
    assert p.grad is not None
    pairs = [(p.detach(), p.grad)]
    if p.squeeze().ndim <= 1:
        pairs = [(p.detach().reshape(-1), p.grad.view(-1))]
    elif p.ndim == 3:
        pairs = [(w.T, g.T) for w, g in zip(p.detach(), p.grad, strict=True)]
    units = []
    for weight, grad in pairs:
        unit = weight.detach()
        unit.grad = grad
        units.append(unit)
    return units


@pytest.mark.parametrize("scale", [1e-4, 0.02, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bit_equal_to_timm_on_many_parameters(dtype: torch.dtype, scale: float) -> None:
    """Every shape three times, with one parameter in channels_last and one whose gradient is strided."""
    parameters = [parameter(shape, scale, seed) for seed in range(3) for shape in [*SHAPES, (16, 4, 3, 3), (1, 50, 60)]]
    for layout in (torch.channels_last, torch.contiguous_format):
        p = parameter((16, 12, 3, 3), scale).detach().contiguous(memory_format=layout).requires_grad_()
        gradient = parameter((16, 12, 3, 3), scale, 1).grad
        assert gradient is not None
        p.grad = gradient.contiguous(memory_format=torch.channels_last)
        parameters.append(p)
    parameters.append(parameter((40, 36), scale))
    parameters[-1].grad = parameters[-1].grad.T.contiguous().T  # type: ignore[union-attr]
    parameters.append(parameter((40, 36), scale))
    parameters[-1].grad = parameter((40, 50), scale).grad[:, 7:43]  # type: ignore[index]
    for p in parameters:
        gradient, p.grad = p.grad, None
        p.data = p.data.to(dtype)
        p.grad = gradient.to(dtype)  # type: ignore[union-attr]
    expected = [twin(p) for p in parameters]
    timm_clip_([unit for p in expected for unit in timm_units(p)])
    adaptive_clip_grad_(parameters)
    for p, e in zip(parameters, expected, strict=True):
        assert p.grad is not None
        assert e.grad is not None
        assert torch.equal(p.grad, e.grad), p.shape


def test_not_finite_gradients() -> None:
    """They stay in their unit, as with timm."""
    for value in (torch.inf, torch.nan):
        p, e = parameter((8, 4), 1.0), parameter((8, 4), 1.0)
        assert p.grad is not None
        assert e.grad is not None
        p.grad[2, 1] = e.grad[2, 1] = value
        adaptive_clip_grad_([p, parameter((5, 4), 1.0)])
        timm_clip_([e])
        torch.testing.assert_close(p.grad, e.grad, rtol=0, atol=0, equal_nan=True)
        assert p.grad.isfinite().all(1).sum() == 7


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "most", "alone"),
    [("resnet50", 75, 335), ("simple_vit_s_patch16_224", 25, 240), ("densenet121", 210, 740)],
)
def test_number_of_operations(model: str, most: int, alone: int, joins: bool) -> None:
    """With timm's function these are 1070, 750 and 2420, and on a GPU each one is a launch."""
    with torch.device("meta"):
        parameters = list(create_model(model).to(memory_format=torch.channels_last).parameters())
    for p in parameters:
        p.grad = torch.empty_like(p)
    with Operations() as operations:
        adaptive_clip_grad_(parameters)
    assert operations.count <= (most if joins else alone)
