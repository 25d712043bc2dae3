"""Pixel perturbation, deletion and insertion: the prediction as pixels are replaced in order of importance.

The image is divided into blocks, which are ranked by their attribution; a growing share of them is replaced.

============================  =================  =========  ============================  =========
metric                        ``order``          ``insert``  usual baseline                better is
============================  =================  =========  ============================  =========
deletion                      ``"most"``         False      0                             small
insertion                     ``"most"``         True       ``"blur"``                    large
pixel perturbation            ``"least"``        False      0                             large
============================  =================  =========  ============================  =========

Sources: Samek et al. (2015, arXiv 1509.06321) for blocks by relevance; Petsiuk et al., "RISE" (BMVC 2018, arXiv
1806.07421), sec. 4.2, for deletion and insertion; Böhle et al., "Convolutional Dynamic Alignment Networks" (CVPR 2021,
arXiv 2104.00032), sec. 4, for the least important first. They remove single pixels and set all six channels to 0; here
the image is perturbed and encoded again, so that every input is the encoding of an image.

Axes: N images, F fractions, S distinct numbers of blocks, B blocks of an image in reading order, C channels of the
model's input, c of the image, H W pixels, K classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation import evaluating, without_tf32
from bcos_train.explanation.method.base import (
    check_positive_integers,
    image_and_encoder,
    image_variant_batches,
    probability_function,
    select_targets,
)
from bcos_train.utils.suggestions import join_words, suggest

__all__ = ["FRACTIONS", "area_under_curve", "perturbation_curve"]

Order = Literal["most", "least"]
Output = Literal["probability", "logit"]

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

_BLUR_RADIUS, _BLUR_STD = 5, 5.0  # in pixels: the kernel size 11 of RISE for 224-pixel images


@torch.no_grad()
@without_tf32()
def perturbation_curve(
    model: nn.Module,
    x: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    order: Order = "most",
    insert: bool = False,
    baseline: float | Tensor | Literal["blur"] = 0.0,
    block: int = 16,
    fractions: Sequence[float] = FRACTIONS,
    output: Output = "probability",
    batch_size: int = 64,
) -> Tensor:
    """Compute the target's output as a growing share of the blocks is replaced, most or least important first.

    For a fraction f, the first round(f B) blocks (halves round to even) are replaced. A block's importance is the sum
    of its attribution, in which NaN and infinity count as 0; ties are in reading order for either ``order``.

    Args:
        model: (N, C, H, W) -> logits (N, K). It runs in evaluation mode; its own mode is restored.
        x: (N, C, H, W), the model's input. With six channels, the image (N, 3, H, W) is perturbed and encoded again.
        attributions: (N, H, W), for the target.
        target: (N,) integers in 0 ... K-1.
        order: Replace the ``"most"`` or the ``"least"`` important blocks first.
        insert: Start from the baseline and restore the blocks of the image, instead of the reverse.
        baseline: Replacement of the image: a number (for six channels 0 is black and 1 white; for standardized input 0
            is the mean color), a tensor broadcastable to (N, c, H, W), or ``"blur"``: the image after a Gaussian blur
            with a standard deviation of 5 pixels, truncated at 5 pixels.
        block: Side of a block in pixels; blocks at the right and lower border are smaller if the image size is not a
            multiple of it. A 32-pixel image has only four blocks of 16 pixels; use 4 there.
        fractions: F shares of the blocks, each in [0, 1].
        output: ``"probability"``: the model's ``to_probabilities``, or softmax for models without it. ``"logit"``: the
            logit minus that of the unperturbed image.
        batch_size: Images per forward pass.

    Returns:
        (N, F), in the dtype of ``x``.

    Raises:
        ValueError: Shapes don't match, a target is not a class, or an argument is out of the ranges above.
    """
    _check_arguments(x, attributions, target, order, output, block, fractions, batch_size)
    image, encode = image_and_encoder(x)
    replacement = _baseline_image(baseline, image)
    start, end = (replacement, image) if insert else (image, replacement)
    ranks, target = _block_ranks(attributions, block, order).to(x.device), target.to(x.device)
    n_blocks = ranks[0].numel()
    counts, step_of_fraction = torch.unique(
        torch.tensor([round(fraction * n_blocks) for fraction in fractions]), return_inverse=True
    )
    counts, step_of_fraction = counts.to(x.device), step_of_fraction.to(x.device)

    to_output = probability_function(model) if output == "probability" else lambda logits: logits
    values = []
    with evaluating(model):
        for n, step in image_variant_batches(len(x), len(counts), batch_size, x.device):
            replaced = _blocks_to_pixels(ranks[n] < counts[step, None, None], block, x.shape[2:])[:, None]
            logits = model(encode(torch.where(replaced, end[n], start[n])))
            values.append(select_targets(to_output(logits), target[n, None])[:, 0])
        if output == "logit":
            unperturbed = [
                select_targets(model(inputs), targets[:, None])
                for inputs, targets in zip(x.split(batch_size), target.split(batch_size), strict=True)
            ]
    curves = torch.cat(values).view(len(x), -1)[:, step_of_fraction]
    if output == "logit":
        curves = curves - torch.cat(unperturbed)
    return curves.to(x.dtype)


def area_under_curve(curves: Tensor, fractions: Sequence[float] = FRACTIONS) -> Tensor:
    """Compute the trapezoidal area divided by the range of the fractions: the mean height of the curve.

    Args:
        curves: (*, F).
        fractions: F >= 2 increasing numbers.

    Returns:
        (*), in units of the curves; NaN where a curve contains NaN.

    Raises:
        ValueError: The lengths differ, or the fractions don't increase.
    """
    positions = torch.tensor([float(f) for f in fractions], dtype=torch.float64)
    if curves.ndim < 1 or curves.shape[-1] != len(positions):
        raise ValueError(f"curves must be (*, {len(positions)}), one value per fraction; got {tuple(curves.shape)}")
    if len(positions) < 2 or not (positions.diff() > 0).all():
        raise ValueError(f"fractions must be at least two increasing numbers, got {list(fractions)}")
    widths = (positions.diff() / (positions[-1] - positions[0])).to(curves)
    return ((curves[..., 1:] + curves[..., :-1]) / 2 * widths).sum(-1)


def _check_arguments(
    x: Tensor,
    attributions: Tensor,
    target: Tensor,
    order: str,
    output: str,
    block: int,
    fractions: Sequence[float],
    batch_size: int,
) -> None:
    if x.ndim != 4 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (N, C, H, W) with N >= 1, got {x.dtype} {tuple(x.shape)}")
    expected = (len(x), *x.shape[2:])
    if attributions.shape != expected:
        raise ValueError(f"attributions must be (N, H, W) = {expected}, got {tuple(attributions.shape)}")
    if target.shape != expected[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must be {expected[0]} integers, got {target.dtype} {tuple(target.shape)}")
    for name, value, allowed in (("order", order, ("most", "least")), ("output", output, ("probability", "logit"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be {join_words(allowed)}{suggest(str(value), allowed)}")
    check_positive_integers(block=block, batch_size=batch_size)
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must be numbers in [0, 1], at least one; got {list(fractions)}")


def _baseline_image(baseline: float | Tensor | str, image: Tensor) -> Tensor:
    """Return the replacement of the image: (N, c, H, W)."""
    if isinstance(baseline, str):
        if baseline != "blur":
            raise ValueError(f"baseline={baseline!r} must be a number, a tensor or 'blur'{suggest(baseline, ['blur'])}")
        return _gaussian_blur(image)
    values = torch.as_tensor(baseline, dtype=image.dtype, device=image.device)
    try:
        return values.expand(image.shape)
    except RuntimeError:
        raise ValueError(f"baseline {tuple(values.shape)} can't be broadcast to {tuple(image.shape)}") from None


def _gaussian_blur(image: Tensor) -> Tensor:
    distance = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-((distance / _BLUR_STD) ** 2) / 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(image.flatten(0, 1)[:, None], [_BLUR_RADIUS] * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(image)


def _block_ranks(attributions: Tensor, block: int, order: str) -> Tensor:
    """Return the rank of each block in the order, from 0: (N, H, W) -> (N, ⌈H/block⌉, ⌈W/block⌉)."""
    height, width = attributions.shape[1:]
    # On the CPU in float64, so that the order is the same on every device.
    finite = attributions.cpu().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    padded = F.pad(finite, (0, -width % block, 0, -height % block))
    sums = padded.unflatten(2, (-1, block)).unflatten(1, (-1, block)).sum((2, 4))
    blocks_by_rank = sums.flatten(1).argsort(dim=1, descending=order == "most", stable=True)
    return blocks_by_rank.argsort(dim=1).view_as(sums)


def _blocks_to_pixels(blocks: Tensor, block: int, size: torch.Size) -> Tensor:
    """Repeat the value of each block for its pixels: (n, ⌈H/block⌉, ⌈W/block⌉) -> (n, H, W)."""
    pixels = blocks.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    return pixels[:, : size[0], : size[1]]
