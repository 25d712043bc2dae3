"""Grad-CAM: where the last feature map speaks for a class.

Axes: N images, T targets of each image, C channels of the features, H' W' their positions, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import CannotExplain, explaining, gradients, select, token_grid

__all__ = ["GradCam"]


@dataclass(frozen=True)
class GradCam:
    """Features weighted by their influence on the logit, positive part (Selvaraju et al., 2017, arXiv 1610.02391).

    The features are those before the head. A channel's weight is the gradient of the logit summed over the
    positions, as in the official evaluation; the paper's mean is the same up to a factor.

    Args:
        interpolation: from positions to pixels.

    Raises:
        CannotExplain: features and head can't be had one by one, or the features have no positions.
    """

    interpolation: Literal["nearest", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r}: nearest or bilinear")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        extractor, head = _split(model)
        with explaining(model, x, targets) as (x, targets):
            with torch.no_grad():
                features = extractor(x)
            leaf = features.detach().clone().requires_grad_()
            maps = _as_maps(model, leaf, x.shape[2:])
            selected = select(head(leaf.clone()), targets)  # a head may work in place
            cams = []
            for gradient in gradients(selected, leaf):
                weights = _as_maps(model, gradient, x.shape[2:]).sum((2, 3), keepdim=True)
                cams.append((weights * maps.detach()).sum(1).relu())
            return F.interpolate(torch.stack(cams, dim=1), size=x.shape[2:], mode=self.interpolation)


def _split(model: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Features and head of a model as they are here, in timm, and in the official package."""
    has = {name for name in ("forward_features", "forward_head") if callable(getattr(model, name, None))}
    if len(has) == 2:
        return model.forward_features, model.forward_head
    if callable(getattr(model, "get_feature_extractor", None)) and callable(getattr(model, "get_classifier", None)):
        # There the classifier gives a score at each position, and its average is the logit less a constant.
        classifier = model.get_classifier()
        return model.get_feature_extractor(), lambda features: classifier(features).mean((2, 3))
    raise CannotExplain(
        f"{type(model).__name__} doesn't have its features and its head apart (forward_features and forward_head), "
        "which Grad-CAM needs"
    )


def _as_maps(model: Any, features: Tensor, size: torch.Size) -> Tensor:
    """(N, C, H', W') of feature maps with the channels first or last, or of tokens (N, H' W', C)."""
    if features.ndim == 3:
        grid = token_grid(features.shape[1], *size)
        if grid is None:
            raise CannotExplain(
                f"{type(model).__name__} gives {features.shape[1]} tokens for an image of {size[0]}x{size[1]}, which "
                "are not those of a grid of patches: a class token has no place that Grad-CAM could show"
            )
        return features.unflatten(1, grid).movedim(-1, 1)
    if features.ndim != 4:
        raise CannotExplain(
            f"{type(model).__name__} gives features {tuple(features.shape)}; Grad-CAM needs some with positions, "
            "(N, C, H, W) or (N, tokens, C)"
        )
    channels = getattr(model, "num_features", None)
    is_channels_last = features.shape[1] != channels and features.shape[3] == channels
    return features.movedim(-1, 1) if is_channels_last else features
