"""Localization losses of Rao et al., "Studying How to Efficiently and Effectively Guide Models with Explanations".

Source: ICCV 2023, arXiv 2303.11932, sec. 3.2, with the normalizations of the authors' code. Training minimizes a
classification loss plus λ times the sum of one of these over the images.

Axes: N images, H W pixels of the mask, h w positions of the map. A map of features is smaller than the mask; it is
resized after its normalization.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOCALIZATION_LOSSES", "energy_loss", "l1_loss", "ppce_loss", "resize_maps", "rrr_loss"]

#: Positive contributions that sum to less than this are not normalized in :func:`energy_loss`.
MIN_TOTAL = 1e-7
#: Upper limit of a pixel's cross-entropy, as in ``torch.nn.BCELoss``.
MAX_CROSS_ENTROPY = 100.0


def energy_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute 1 minus the share of the positive contributions inside the mask.

    Of a map whose positive contributions sum to less than 1e-7, the sum inside is used in place of the share.

    Args:
        maps: (N, h, w), signed contributions to the logit of the mask's class.
        masks: (N, H, W) bool, True inside the boxes of that class.

    Returns:
        (N,), at least float32.
    """
    positive = resize_maps(_at_least_float32(maps), masks).clamp(min=0)
    total, inside = positive.sum((1, 2)), (positive * masks).sum((1, 2))
    return 1 - inside / torch.where(total < MIN_TOTAL, 1, total)


def l1_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the mean over all pixels of |a - mask|, where a are the positive contributions divided by their maximum.

    Arguments and result as for :func:`energy_loss`.
    """
    scaled = resize_maps(_divide_by_maximum(_at_least_float32(maps).clamp(min=0)), masks)
    return (scaled - masks.to(scaled.dtype)).abs().mean((1, 2))


def ppce_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the per-pixel cross-entropy: the mean of -log a over the mask, with a as in :func:`l1_loss`.

    It is 100 where a is 0, and 0 for an empty mask. Arguments and result as for :func:`energy_loss`.
    """
    scaled = resize_maps(_divide_by_maximum(_at_least_float32(maps).clamp(min=0)), masks)
    # The inner `where` keeps the infinite derivative of log 0 out of the gradient, which would become NaN.
    is_positive = scaled > 0
    entropy = torch.where(is_positive, -torch.where(is_positive, scaled, 1).log(), MAX_CROSS_ENTROPY)
    entropy = entropy.clamp(max=MAX_CROSS_ENTROPY)
    return (entropy * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)


def rrr_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the sum over the pixels outside the mask of a², where a are the contributions divided by max |a|.

    This is RRR* of the paper, after Ross et al. (IJCAI 2017, arXiv 1703.03717). Arguments and result as for
    :func:`energy_loss`.
    """
    scaled = resize_maps(_divide_by_maximum(_at_least_float32(maps)), masks)
    return (scaled.square() * ~masks).sum((1, 2))


#: Loss of each image by the names in ``configs/guidance``: (maps (N, h, w), masks (N, H, W)) -> (N,).
LOCALIZATION_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy": energy_loss,
    "l1": l1_loss,
    "ppce": ppce_loss,
    "rrr": rrr_loss,
}


def resize_maps(maps: Tensor, masks: Tensor) -> Tensor:
    """Resize maps (N, h, w) bilinearly to the size of the masks (N, H, W), unless they have it."""
    if maps.shape[1:] == masks.shape[1:]:
        return maps
    return F.interpolate(maps[:, None], size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _divide_by_maximum(maps: Tensor) -> Tensor:
    """Divide each map by its largest absolute value; a map of zeros stays one."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    return maps / torch.where(largest == 0, 1, largest)
