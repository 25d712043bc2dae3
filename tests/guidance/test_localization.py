"""Localization losses by hand, and against one image at a time."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.guidance import LOCALIZATION_LOSSES, energy_loss, l1_loss, ppce_loss, rrr_loss

MAP = torch.tensor([[4.0, -8.0], [2.0, 2.0]])
MASK = torch.tensor([[True, True], [False, False]])
ALL = pytest.mark.parametrize("loss", LOCALIZATION_LOSSES.values(), ids=LOCALIZATION_LOSSES)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (energy_loss, 1 - 4 / 8),
        (l1_loss, (0 + 1 + 0.5 + 0.5) / 4),
        (ppce_loss, (0 + 100) / 2),
        (rrr_loss, 2 * (2 / 8) ** 2),
    ],
)
def test_by_hand(loss: Callable[[Tensor, Tensor], Tensor], expected: float) -> None:
    assert loss(MAP[None], MASK[None]).tolist() == pytest.approx([expected])


def test_cross_entropy_by_hand() -> None:
    maps = torch.tensor([[[4.0, 1.0], [2.0, -3.0]]])
    assert ppce_loss(maps, MASK[None]).item() == pytest.approx(-math.log(1 / 4) / 2)


@pytest.mark.parametrize(
    ("loss", "expected"), [(energy_loss, 1.0), (l1_loss, 0.5), (ppce_loss, 100.0), (rrr_loss, 0.0)]
)
def test_a_map_of_zeros_has_no_gradient_to_its_normalization(
    loss: Callable[[Tensor, Tensor], Tensor], expected: float
) -> None:
    maps = torch.zeros(1, 2, 2, requires_grad=True)
    value = loss(maps, MASK[None])
    assert value.tolist() == [expected]
    value.sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_energy_of_a_tiny_total_is_not_normalized() -> None:
    maps = torch.tensor([[[3e-8, 0.0], [6e-8, -1.0]], [[3e-8, 0.0], [7.1e-8, -1.0]]], dtype=torch.float64)
    expected = [1 - 3e-8, 1 - 3e-8 / 10.1e-8]
    assert energy_loss(maps, MASK.expand(2, 2, 2)).tolist() == pytest.approx(expected, abs=1e-12)


@ALL
def test_an_empty_mask_is_finite(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    maps = MAP[None].clone().requires_grad_()
    value = loss(maps, torch.zeros(1, 2, 2, dtype=torch.bool))
    value.sum().backward()
    assert value.isfinite().all()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


@ALL
def test_the_images_do_not_depend_on_each_other(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 4, 6, generator=generator, dtype=torch.float64)
    masks = torch.rand(5, 8, 12, generator=generator) > 0.5
    one_by_one = [loss(maps[i : i + 1], masks[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(loss(maps, masks), torch.cat(one_by_one))


@ALL
def test_the_scale_of_a_map_does_not_matter(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.5
    torch.testing.assert_close(loss(7 * maps, masks), loss(maps, masks))


@ALL
def test_the_gradient_is_that_of_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Also through the maximum that a map is divided by."""
    maps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    masks = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(4)) > 0.5
    assert torch.autograd.gradcheck(lambda maps: loss(maps, masks), [maps], eps=1e-7, atol=1e-5)


@ALL
def test_low_precision_is_computed_in_float32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    maps = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    masks = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    result = loss(maps, masks)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(maps.float(), masks))


def test_maps_are_resized_after_their_normalization() -> None:
    maps, masks = MAP[None], MASK.repeat_interleave(2, 0).repeat_interleave(2, 1)[None]

    def resized(maps: Tensor) -> Tensor:
        return F.interpolate(maps[None], size=(4, 4), mode="bilinear", align_corners=False)[0]

    positive = resized(maps.clamp(min=0) / 4)
    assert l1_loss(maps, masks).item() == pytest.approx((positive - masks.float()).abs().mean().item())
    assert ppce_loss(maps, masks).item() == pytest.approx(-positive[masks].log().clamp(min=-100).mean().item())
    assert rrr_loss(maps, masks).item() == pytest.approx(resized(maps / 8)[~masks].square().sum().item())
    # Negative values first: the loss of energy is the one that is clamped at the end.
    energy = resized(maps).clamp(min=0)
    assert energy_loss(maps, masks).item() == pytest.approx(1 - (energy[masks].sum() / energy.sum()).item())
