"""Grad-CAM: evidence for a class in the last feature map.

Axes: N images, T targets per image, C channels of the features, H' W' their positions, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    CannotExplain,
    attribution_context,
    select_targets,
    target_gradients,
    token_grid,
)

__all__ = ["GradCam"]


@dataclass(frozen=True)
class GradCam:
    """Weight features by their influence on the logit and keep the positive part (Selvaraju et al., arXiv 1610.02391).

    The features are the input of the head. A channel's weight is the gradient of the logit summed over positions, as in
    the official evaluation; the paper's mean is the same up to a factor.

    Args:
        interpolation: ``"nearest"`` or ``"bilinear"``, from positions to pixels.

    Raises:
        CannotExplain: The model's features and head aren't separate, or the features have no positions.
    """

    interpolation: Literal["nearest", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r}: nearest or bilinear")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        extractor, head = _split_features_and_head(model)
        with attribution_context(model, x, targets) as (x, targets):
            with torch.no_grad():
                features = extractor(x)
            leaf = features.detach().clone().requires_grad_()
            maps = _channels_first(model, leaf, x.shape[2:])
            selected = select_targets(head(leaf.clone()), targets)  # a head may modify its input in place
            cams = []
            for gradient in target_gradients(selected, leaf):
                weights = _channels_first(model, gradient, x.shape[2:]).sum((2, 3), keepdim=True)
                cams.append((weights * maps.detach()).sum(1).relu())
            return F.interpolate(torch.stack(cams, dim=1), size=x.shape[2:], mode=self.interpolation)


def _split_features_and_head(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return features and head of models of this package, timm and the official package."""
    features, head = getattr(model, "forward_features", None), getattr(model, "forward_head", None)
    if callable(features) and callable(head):
        return features, head
    get_features, get_classifier = getattr(model, "get_feature_extractor", None), getattr(model, "get_classifier", None)
    if callable(get_features) and callable(get_classifier):
        # The official classifiers return a score at each position, whose average is the logit minus a constant.
        classifier = get_classifier()
        return get_features(), lambda features: classifier(features).mean((2, 3))
    raise CannotExplain(
        f"{type(model).__name__} doesn't separate its features from its head (forward_features and forward_head), as "
        "Grad-CAM requires"
    )


def _channels_first(model: nn.Module, features: Tensor, size: torch.Size) -> Tensor:
    """Convert channels-last feature maps or tokens (N, H' W', C) to (N, C, H', W')."""
    if features.ndim == 3:
        grid = token_grid(features.shape[1], *size)
        if grid is None:
            raise CannotExplain(
                f"{type(model).__name__} returns {features.shape[1]} tokens for an image of {size[0]}x{size[1]}, which "
                "are not those of a grid of patches: a class token has no position for Grad-CAM"
            )
        return features.unflatten(1, grid).movedim(-1, 1)
    if features.ndim != 4:
        raise CannotExplain(
            f"{type(model).__name__} returns features {tuple(features.shape)}; Grad-CAM requires positions, "
            "(N, C, H, W) or (N, tokens, C)"
        )
    channels = getattr(model, "num_features", None)
    is_channels_last = features.shape[1] != channels and features.shape[3] == channels
    return features.movedim(-1, 1) if is_channels_last else features
