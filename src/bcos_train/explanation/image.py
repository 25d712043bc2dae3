"""Explanations as images: W(x) as a color image, contribution maps in red and blue.

Axes: N images, C = 6 encoded channels [r, g, b, 1-r, 1-g, 1-b], H W pixels.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.explanation.dynamic_linear import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["color_explanation", "gradient_to_image", "official_dict", "plot_contribution_map"]

_NEGATIVE_ALPHA = 1e-12  # opacity of pixels with a negative contribution, as in the official code


@torch.no_grad()
def color_explanation(x: Tensor, weights: Tensor, smooth: int | None = 15, alpha_percentile: float = 99.5) -> Tensor:
    """Convert W(x) to a color image: the hue shows the color that the weights favor, the opacity their norm.

    Only positive weights count: red is the weight of r relative to r and 1-r, and so on. Opacity is the L2 norm of the
    pixel's weights, about zero where the pixel's contribution is negative, averaged over a window, divided by a
    percentile of the image and clamped to 1. The numbers follow the official code (github.com/B-cos/B-cos-v2).

    Args:
        x: (N, 6, H, W).
        weights: (N, 6, H, W), W(x).
        smooth: Width of the window in pixels; it may exceed the image. Even windows extend one pixel further to the
            right and down. None, 0 and 1: no smoothing.
        alpha_percentile: Percentile of the opacity that is shown as fully opaque, in [0, 100].

    Returns:
        (N, H, W, 4): RGB and opacity, in [0, 1], float32 (float64 for float64 weights). Weights of zero are fully
        transparent. If fewer pixels have a positive contribution than the percentile excludes, opacity is 1
        everywhere, as in the official code.

    Raises:
        ValueError: A shape, ``smooth`` or ``alpha_percentile`` is not as above.
    """
    if x.shape != weights.shape or x.ndim != 4 or x.shape[1] != 6:
        raise ValueError(f"x and weights must both be (N, 6, H, W), got {tuple(x.shape)} and {tuple(weights.shape)}")
    if smooth is not None and smooth < 0:
        raise ValueError(f"smooth must be None or at least 0, got {smooth}")
    if not 0 <= alpha_percentile <= 100:
        raise ValueError(f"alpha_percentile must be in [0, 100], got {alpha_percentile}")
    if weights.dtype != torch.float64:
        x, weights = x.float(), weights.float()

    positive = (weights / (weights.abs().amax(1, keepdim=True) + 1e-12)).clamp(min=0)
    rgb = positive[:, :3] / (positive[:, :3] + positive[:, 3:] + 1e-12)

    contributions = (x * weights).sum(1, keepdim=True)
    alpha = weights.norm(p=2, dim=1, keepdim=True)
    alpha = torch.where(contributions < 0, _NEGATIVE_ALPHA, alpha)
    if smooth is not None and smooth > 1:
        before, after = (smooth - 1) // 2, smooth // 2
        alpha = F.avg_pool2d(F.pad(alpha, (before, after, before, after)), smooth, stride=1)
    opaque = torch.quantile(alpha.flatten(1), alpha_percentile / 100, dim=1)[:, None, None, None]
    alpha = (alpha / opaque.clamp(min=torch.finfo(alpha.dtype).tiny)).clamp(0, 1)
    return torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1)


def gradient_to_image(
    image: Tensor, linear_mapping: Tensor, smooth: int | None = 15, alpha_percentile: float = 99.5
) -> np.ndarray:
    """Apply :func:`color_explanation` to one image, under the official name.

    Args:
        image: (6, H, W).
        linear_mapping: (6, H, W), W(x).
        smooth: As for :func:`color_explanation`.
        alpha_percentile: As for :func:`color_explanation`.

    Returns:
        (H, W, 4) in [0, 1], ready for ``imshow``.

    Raises:
        ValueError: As for :func:`color_explanation`.
    """
    if image.ndim != 3 or linear_mapping.ndim != 3:
        shapes = f"{tuple(image.shape)} and {tuple(linear_mapping.shape)}"
        raise ValueError(f"image and linear_mapping must both be (6, H, W), got {shapes}")
    return color_explanation(image[None], linear_mapping[None], smooth, alpha_percentile)[0].cpu().numpy()


def plot_contribution_map(
    contribution_map: Tensor | np.ndarray,
    ax: "Axes | None" = None,
    vrange: float | Literal["auto"] | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    hide_ticks: bool = True,
    cmap: str = "bwr",
    percentile: float = 99.5,
) -> "tuple[Axes, AxesImage]":
    """Plot a contribution map: red is evidence for the class, blue evidence against it.

    Args:
        contribution_map: (H, W) or (1, H, W), in units of the logit.
        ax: Axes to plot into; ``None``: a new pyplot figure.
        vrange: The color map covers -vrange to vrange. ``None`` or ``"auto"``: the largest absolute value after
            clipping.
        vmin: Replaces -vrange.
        vmax: Replaces vrange.
        hide_ticks: Hide the ticks of the axes.
        cmap: Matplotlib color map; a diverging one shows the sign.
        percentile: Values are clipped to this percentile of the absolute values, in [0, 100].

    Returns:
        The axes and the image.

    Raises:
        ValueError: The map has another shape.
    """
    values = contribution_map.detach().cpu().numpy() if isinstance(contribution_map, Tensor) else contribution_map
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2:
        raise ValueError(f"contribution_map must be (H, W) or (1, H, W), got {tuple(values.shape)}")
    cutoff = np.percentile(np.abs(values), percentile)
    values = np.clip(values, -cutoff, cutoff)
    if vrange is None or vrange == "auto":
        # Any positive range shows a map of zeros in the neutral color.
        vrange = float(np.abs(values).max()) or 1.0
    if ax is None:
        import matplotlib.pyplot as plt  # imported here, since pyplot has global state and may open a window

        _, ax = plt.subplots(1)
    image = ax.imshow(values, cmap=cmap, vmin=-vrange if vmin is None else vmin, vmax=vrange if vmax is None else vmax)
    if hide_ticks:
        ax.set_xticks([])
        ax.set_yticks([])
    return ax, image


def official_dict(
    explanation: Explanation, x: Tensor, *, smooth: int | None = 15, alpha_percentile: float = 99.5
) -> dict[str, int | Tensor | np.ndarray]:
    """Convert one image's explanation to the dictionary that the official ``model.explain`` returns.

    Args:
        explanation: Explanation of a batch of one image.
        x: (1, 6, H, W), the explained input.
        smooth: As for :func:`color_explanation`.
        alpha_percentile: As for :func:`color_explanation`.

    Returns:
        ``prediction`` int, ``explained_class_idx`` int, ``dynamic_linear_weights`` (1, 6, H, W),
        ``contribution_map`` (1, H, W), ``explanation`` (H, W, 4) NumPy.

    Raises:
        ValueError: More than one image, or as for :func:`color_explanation`.
    """
    if len(x) != 1 or len(explanation.target) != 1:
        raise ValueError(f"expected one image, got x of {len(x)} and explanations of {len(explanation.target)}")
    return {
        "prediction": int(explanation.prediction),
        "explained_class_idx": int(explanation.target),
        "dynamic_linear_weights": explanation.weights,
        "contribution_map": explanation.contribution_map,
        "explanation": gradient_to_image(x[0], explanation.weights[0], smooth, alpha_percentile),
    }
