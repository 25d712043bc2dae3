"""What every B-cos model can do besides ``forward``."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.dataset.encoding import BcosEncoding
from bcos_train.explanation import (
    explain,
    explanation_mode,
    gradient_to_image,
    official_dict,
    plot_contribution_map,
)
from bcos_train.model.recompute import set_grad_checkpointing
from bcos_train.model.transform import InferenceTransform
from bcos_train.suggest import suggest

__all__ = ["PREVIOUS_GROUP", "BcosModel", "GroupMatcher", "check_images", "resolve_pooling"]

#: What :func:`timm.models.group_parameters` reads: a pattern for the names of each group's parameters, or several, each
#: with a suffix of the group's number. Parameters that match none make the last group.
GroupMatcher = Mapping[str, str | list[tuple[str, tuple[int, ...] | None]]]
#: timm's suffix for what belongs to the group before it.
PREVIOUS_GROUP = (99999,)


class BcosModel(nn.Module):
    """A module ``(N, C, H, W) -> (N, K)`` with explanations, as users of the official models know them.

    The model is ``forward_head(forward_features(x))``, as in timm. Subclasses define those two, ``get_classifier``,
    ``get_feature_extractor`` and ``reset_classifier``; one that defines ``forward`` itself needs neither.
    """

    #: PIL image -> ``(6, H, W)``: the inference transform that belongs to the model; ImageNet's unless a model says so.
    transform: Callable[[Any], Tensor] = InferenceTransform(256, 224, BcosEncoding())
    #: Channels of the input.
    in_chans: int = 6
    #: K; 0 after ``reset_classifier(0)``.
    num_classes: int
    #: ``"avg"``, or ``""`` after ``reset_classifier(0, "")``.
    global_pool: str = "avg"
    #: Channels of what ``forward_features`` gives.
    num_features: int
    #: Length of the vector that ``forward_head(..., pre_logits=True)`` gives for an image.
    head_hidden_size: int

    #: Logits -> probabilities under the binary cross-entropy that B-cos models are trained with.
    to_probabilities = staticmethod(torch.sigmoid)

    gradient_to_image = staticmethod(gradient_to_image)
    plot_contribution_map = staticmethod(plot_contribution_map)

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything before the head: ``(N, in_chans, H, W) ->`` a feature map or tokens."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From what ``forward_features`` gives to logits ``(N, K)``.

        With ``pre_logits`` to the classifier's input, averaged over the positions: ``(N, head_hidden_size)``. Where
        there is no average (``global_pool=""``), to that of each position.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def explanation_mode(self) -> AbstractContextManager[Any]:
        """Context (or decorator) in which the gradient of a logit is the dynamic linear weight W(x)."""
        return explanation_mode(self)

    def explain(
        self, in_tensor: Tensor, idx: int | None = None, *, smooth: int = 15, alpha_percentile: float = 99.5
    ) -> dict[str, Any]:
        """Explain one image.

        Args:
            in_tensor: ``(1, 6, H, W)`` in [0, 1]. It is left as it was.
            idx: Class to explain; ``None``: the predicted one.
            smooth: Kernel size of the average pooling of the colour image's opacity.
            alpha_percentile: Percentile in [0, 100] of the opacity that is shown as fully opaque.

        Returns:
            ``prediction`` (int), ``explained_class_idx`` (int), ``dynamic_linear_weights`` W(x) ``(1, 6, H, W)``,
            ``contribution_map`` ``(1, H, W)`` and ``explanation`` (RGBA array ``(H, W, 4)`` in [0, 1]).

        Raises:
            ValueError: Not one four-dimensional image, ``idx`` out of range, or a model that takes another number of
                channels than 6, for which there is no colour image.
        """
        self._check_explained(in_tensor)
        result = explain(self, in_tensor, idx)
        return official_dict(result, in_tensor, smooth=smooth, alpha_percentile=alpha_percentile)

    def _check_explained(self, in_tensor: Tensor) -> None:
        takes = f"(1, {self.in_chans}, H, W)"
        if self.in_chans != 6:
            raise ValueError(
                "model.explain makes a colour image of 6 channels [r, g, b, 1-r, 1-g, 1-b], but this model takes "
                f"{takes}: bcos_train.explain gives its W(x) and contribution map"
            )
        if in_tensor.ndim != 4 or in_tensor.shape[0] != 1:
            raise ValueError(f"explain takes one image {takes}, got {tuple(in_tensor.shape)}; see bcos_train.explain")
        if in_tensor.shape[1] != self.in_chans:
            raise ValueError(
                f"explain takes one image {takes}, got {tuple(in_tensor.shape)}: a B-cos network's input is "
                "[r, g, b, 1-r, 1-g, 1-b], which model.transform makes of an image"
            )

    def get_classifier(self) -> nn.Module:
        """The module that turns features into class scores."""
        raise NotImplementedError

    def get_feature_extractor(self) -> nn.Module:
        """A module that computes ``forward_features``, sharing its parameters with this model."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier with random weights in the place of the present one.

        Args:
            num_classes: K; 0 leaves the classifier out: the model then gives ``(N, head_hidden_size)``.
            global_pool: ``"avg"``; with 0 classes also ``""``: the model then gives the vector of each position.
                ``None``: as it is.

        Raises:
            ValueError: A negative number, or another ``global_pool``.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, compute the inside of each block again in the backward pass rather than keep it, or don't.

        Outputs, gradients and running statistics are the same; see :mod:`bcos_train.model.recompute`.

        Raises:
            ValueError: The network has no blocks.
        """
        set_grad_checkpointing(self, enable)

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """What timm's layer-wise learning rates go by: the parameters from the stem to the head.

        Args:
            coarse: A group for each stage rather than each block.
        """
        raise NotImplementedError


def check_images(x: Tensor, in_chans: int, min_size: int, owner: str) -> None:
    """Raise a ValueError unless ``x`` is ``(N, in_chans, H, W)`` with H and W at least ``min_size``."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"the model takes (N, {in_chans}, H, W), got {tuple(x.shape)}")
    if min(x.shape[2:]) < min_size:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} is too small: {owner} takes at least {min_size}x{min_size}"
        )


def resolve_pooling(num_classes: int, global_pool: str | None, present: str = "avg") -> str:
    """The pooling of a head with so many classes: the given one, or with ``None`` the present one.

    Raises:
        ValueError: A negative number of classes; a pooling other than ``"avg"`` and, without classes, ``""``.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: at least 0")
    pooling = present if global_pool is None else global_pool
    if pooling == "" and num_classes:
        raise ValueError(f"global_pool='' (no average) goes with num_classes=0, got {num_classes}: global_pool='avg'")
    if pooling not in ("avg", ""):
        raise ValueError(
            f"global_pool={pooling!r}{suggest(pooling, ['avg'])}: 'avg', or with num_classes=0 '' for no average"
        )
    return pooling
