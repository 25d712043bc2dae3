"""Metrics that Quantus also has, compared with it; its known faults are shown, not imitated.

Its faults: the pointing game scores an empty mask as a hit and a constant map likewise; shares have 1e-9 added to
their total, and the Gini index 1e-7 to each pixel, so that both depend on the scale of the map.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcos_train.metric import (
    energy_pointing_scores,
    gini_index,
    grid_pointing_scores,
    perturbation_curve,
    pointing_game_scores,
)

quantus = pytest.importorskip("quantus", reason="Quantus, which these metrics are compared with, isn't installed")

QUIET = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}
N, H, W = 6, 8, 8

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*segmentation.*:UserWarning"),
]


@pytest.fixture
def maps() -> Tensor:
    return torch.randn(N, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def masks() -> Tensor:
    return torch.rand(N, H, W, generator=torch.Generator().manual_seed(1)) < 0.3


def theirs(metric: Any, maps: Tensor, masks: Tensor | None = None, x: Tensor | None = None, **more: Any) -> Tensor:
    scores = metric(
        model=more.pop("model", nn.Identity()),
        x_batch=(torch.zeros(len(maps), 1, H, W) if x is None else x).numpy(),
        y_batch=more.pop("y_batch", np.zeros(len(maps), dtype=int)),
        a_batch=maps[:, None].numpy().copy(),
        s_batch=None if masks is None else masks[:, None].numpy().copy(),
        channel_first=True,
        device="cpu",
        **more,
    )
    return torch.tensor(np.array(scores), dtype=torch.float64)


def test_energy_pointing_is_their_relevance_mass_of_positive_maps(maps: Tensor, masks: Tensor) -> None:
    scores = theirs(quantus.RelevanceMassAccuracy(**QUIET), maps.clamp(min=0), masks)
    assert torch.allclose(energy_pointing_scores(maps, masks), scores, atol=1e-12)


def test_energy_pointing_is_their_attribution_localization(maps: Tensor, masks: Tensor) -> None:
    metric = quantus.AttributionLocalisation(positive_attributions=True, **QUIET)
    assert torch.allclose(energy_pointing_scores(maps, masks), theirs(metric, maps, masks), atol=1e-9)


def test_pointing_game(maps: Tensor, masks: Tensor) -> None:
    scores = pointing_game_scores(maps, masks)
    assert torch.equal(scores, theirs(quantus.PointingGame(**QUIET), maps, masks))
    assert 0 < scores.mean() < 1


def test_pointing_game_scores_no_empty_mask_and_no_empty_map(maps: Tensor, masks: Tensor) -> None:
    masks[0] = False
    maps[1] = 0
    scores = theirs(quantus.PointingGame(**QUIET), maps, masks)
    assert scores[:2].tolist() == [1, 1]
    assert pointing_game_scores(maps, masks)[:2].tolist() == [0, 0]


def test_empty_mask_and_no_positive_energy(maps: Tensor, masks: Tensor) -> None:
    masks[0] = False
    metric = quantus.AttributionLocalisation(positive_attributions=True, **QUIET)
    maps[1] = -maps[1].abs()
    scores = theirs(metric, maps, masks)
    assert math.isnan(scores[0])
    assert scores[1] == 0
    own = energy_pointing_scores(maps, masks)
    assert own[:2].tolist() == [0, 0]
    assert torch.allclose(own[1:], scores[1:], atol=1e-9)


def test_gini_index_is_their_sparseness(maps: Tensor) -> None:
    scores = theirs(quantus.Sparseness(**{**QUIET, "abs": True}), maps)
    assert torch.allclose(gini_index(maps), scores, atol=1e-6)
    # Their stabilizing term: at this scale it makes up half of the map.
    small = theirs(quantus.Sparseness(**{**QUIET, "abs": True}), 1e-7 * maps)
    assert (small < 0.7 * scores).all()
    assert torch.allclose(gini_index(1e-7 * maps), gini_index(maps))


def test_grid_pointing_of_one_cell_is_their_focus(maps: Tensor) -> None:
    cells = torch.eye(4, dtype=torch.long)
    scores = theirs(quantus.Focus(**QUIET), maps[:4], custom_batch=cells.tolist())
    assert torch.allclose(grid_pointing_scores(maps[None, :4], smooth=1)[0], scores, atol=1e-9)


@pytest.mark.parametrize("step", [1, 4, 16])
def test_deletion_of_single_pixels_is_their_pixel_flipping(maps: Tensor, step: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(N, 1, H, W)
    with torch.no_grad():
        model(x)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    metric = quantus.PixelFlipping(features_in_step=step, perturb_baseline=0.25, **QUIET)
    scores = theirs(metric, maps, x=x, model=model, y_batch=target.numpy(), softmax=True)
    ends = range(step, H * W + 1, step)
    curves = perturbation_curve(
        model, x, maps, target, block=1, baseline=0.25, fractions=[end / (H * W) for end in ends]
    )
    assert curves.shape == (N, H * W // step)
    assert torch.allclose(curves.double(), scores, atol=1e-6)
