"""Color explanations and contribution maps: the official numbers, and the cases that break the official code."""

import bcos
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bcos_train.explanation import (
    Explanation,
    color_explanation,
    gradient_to_image,
    official_dict,
    plot_contribution_map,
)

matplotlib.use("Agg")


def batch(n: int = 3, height: int = 20, width: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(n, 3, height, width, generator=generator)
    return torch.cat([rgb, 1 - rgb], 1), torch.randn(n, 6, height, width, generator=generator)


@pytest.mark.parametrize("size", [8, 32, 40])
@pytest.mark.parametrize("smooth", [0, 1, 3, 15])
@pytest.mark.parametrize("percentile", [0.0, 50.0, 99.5, 100.0])
def test_equals_the_official_image(size: int, smooth: int, percentile: float):
    x, weights = batch(height=size, width=size + 3)
    images = color_explanation(x, weights, smooth, percentile)
    assert images.shape == (3, size, size + 3, 4)
    for n in range(3):
        official = bcos.common.gradient_to_image(x[n], weights[n], smooth, percentile)
        np.testing.assert_allclose(images[n].numpy(), official, rtol=0, atol=1e-6)
        np.testing.assert_allclose(gradient_to_image(x[n], weights[n], smooth, percentile), official, rtol=0, atol=1e-6)


def test_defaults_are_the_official_ones():
    x, weights = batch(1)
    np.testing.assert_allclose(
        gradient_to_image(x[0], weights[0]), bcos.common.gradient_to_image(x[0], weights[0]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("smooth", [2, 4, 16])
def test_even_windows_average_from_half_a_window_before(smooth: int):
    x, weights = batch(1, 9, 11)
    raw = color_explanation(x, weights, None, 100)[0, ..., 3]
    alpha = torch.zeros_like(raw)
    for i in range(9):
        for j in range(11):
            top, left = i - (smooth - 1) // 2, j - (smooth - 1) // 2
            window = raw[max(top, 0) : top + smooth, max(left, 0) : left + smooth]
            alpha[i, j] = window.sum() / smooth**2
    smoothed = color_explanation(x, weights, smooth, 100)[0, ..., 3]
    torch.testing.assert_close(smoothed, alpha / alpha.max())


def test_none_is_no_smoothing():
    x, weights = batch()
    assert torch.equal(color_explanation(x, weights, None), color_explanation(x, weights, 0))


@pytest.mark.parametrize("weight", [0.0, -1.0], ids=["no-weights", "all-against"])
def test_image_without_evidence_is_finite(weight: float):
    x, _ = batch()
    image = color_explanation(x, torch.full_like(x, weight))
    assert image.isfinite().all()
    assert (image >= 0).all()
    assert (image <= 1).all()
    if weight == 0:
        assert (image[..., 3] == 0).all()


def test_half_precision_is_raised_to_float32_and_inputs_keep_no_graph():
    x, weights = batch()
    image = color_explanation(x.half(), weights.half().requires_grad_())
    assert image.dtype == torch.float32
    assert not image.requires_grad
    torch.testing.assert_close(image, color_explanation(x.half().float(), weights.half().float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.rand(2, 6, 8, 9)}, r"\(2, 6, 8, 9\) and \(2, 6, 8, 8\)"),
        ({"x": torch.rand(2, 3, 8, 8), "weights": torch.rand(2, 3, 8, 8)}, r"\(N, 6, H, W\)"),
        ({"smooth": -1}, "smooth must be None or at least 0, got -1"),
        ({"alpha_percentile": 101}, r"in \[0, 100\], got 101"),
    ],
    ids=["shapes-differ", "three-channels", "smooth", "percentile"],
)
def test_wrong_arguments(arguments: dict, message: str):
    valid = {"x": torch.rand(2, 6, 8, 8), "weights": torch.rand(2, 6, 8, 8)}
    with pytest.raises(ValueError, match=message):
        color_explanation(**(valid | arguments))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"vrange": 2.0}, {"vmin": -1.0, "vmax": 3.0}, {"percentile": 80.0, "cmap": "RdBu"}, {"hide_ticks": False}],
    ids=["defaults", "vrange", "limits", "percentile", "ticks"],
)
def test_plot_equals_the_official_one(arguments: dict):
    values = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    ours, official = Figure().subplots(), Figure().subplots()
    returned, image = plot_contribution_map(values, ours, **arguments)
    _, expected = bcos.common.plot_contribution_map(values, official, **arguments)
    assert returned is ours
    np.testing.assert_array_equal(image.get_array(), expected.get_array())
    assert image.get_clim() == expected.get_clim()
    assert image.get_cmap().name == expected.get_cmap().name
    np.testing.assert_array_equal(ours.get_xticks(), official.get_xticks())


def test_plot_takes_what_explain_returns_and_opens_a_figure():
    import matplotlib.pyplot as plt

    ax, image = plot_contribution_map(torch.zeros(1, 5, 5).numpy())
    assert image.get_clim() == (-1, 1)  # zeros are neutral, not the blue end of the scale
    plt.close(ax.figure)
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        plot_contribution_map(torch.zeros(2, 5, 5))


def test_official_dict():
    x, weights = batch(1)
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    explanation = Explanation(logits, torch.tensor([1]), torch.tensor([2]), weights, (x * weights).sum(1))
    result = official_dict(explanation, x, smooth=3, alpha_percentile=90)
    assert list(result) == [
        "prediction",
        "explained_class_idx",
        "dynamic_linear_weights",
        "contribution_map",
        "explanation",
    ]
    assert (result["prediction"], result["explained_class_idx"]) == (1, 2)
    assert type(result["prediction"]) is type(result["explained_class_idx"]) is int
    assert result["dynamic_linear_weights"] is weights
    assert result["contribution_map"].shape == (1, 20, 24)
    np.testing.assert_array_equal(result["explanation"], gradient_to_image(x[0], weights[0], 3, 90))
    with pytest.raises(ValueError, match="expected one image, got x of 2"):
        official_dict(explanation, torch.cat([x, x]))
