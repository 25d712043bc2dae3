"""Base class of the B-cos models: features and head, explanations, gradient checkpointing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bcos_train.dataset.encoding import BcosEncoding
from bcos_train.explanation import (
    explain,
    explanation_mode,
    gradient_to_image,
    official_dict,
    plot_contribution_map,
)
from bcos_train.model.grad_checkpointing import set_grad_checkpointing
from bcos_train.model.transform import InferenceTransform
from bcos_train.utils.suggestions import suggest

__all__ = ["PREVIOUS_GROUP", "BcosModel", "GroupMatcher", "check_images", "resolve_pooling"]

#: Argument of :func:`timm.models.group_parameters`: for each group a pattern of parameter names, or several patterns,
#: each with a suffix of the group's number. Parameters that match no pattern form the last group.
GroupMatcher = Mapping[str, str | list[tuple[str, tuple[int, ...] | None]]]
#: timm's suffix for parameters of the preceding group.
PREVIOUS_GROUP = (99999,)


class BcosModel(nn.Module):
    """Base class of models ``(N, C, H, W) -> (N, K)`` with explanations, with the interface of the official models.

    The model is ``forward_head(forward_features(x))``, as in timm. Subclasses define those two, ``get_classifier``,
    ``get_feature_extractor`` and ``reset_classifier``; subclasses that define ``forward`` need neither of the two.
    """

    #: Inference transform, PIL image -> ``(6, H, W)``. Default: ImageNet's.
    transform: Callable[[Image.Image], Tensor] = InferenceTransform(256, 224, BcosEncoding())
    #: Channels of the input.
    in_chans: int = 6
    #: K; 0 after ``reset_classifier(0)``.
    num_classes: int
    #: ``"avg"``, or ``""`` after ``reset_classifier(0, "")``.
    global_pool: str = "avg"
    #: Channels of the output of ``forward_features``.
    num_features: int
    #: Length of the vector that ``forward_head(..., pre_logits=True)`` returns for an image.
    head_hidden_size: int

    #: Map from logits to probabilities, for the binary cross-entropy that B-cos models are trained with.
    to_probabilities = staticmethod(torch.sigmoid)

    gradient_to_image = staticmethod(gradient_to_image)
    plot_contribution_map = staticmethod(plot_contribution_map)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the input of the head: ``(N, in_chans, H, W) ->`` a feature map or tokens."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits ``(N, K)`` from the output of ``forward_features``.

        With ``pre_logits`` compute the classifier's input, averaged over positions: ``(N, head_hidden_size)``. Without
        average (``global_pool=""``), that of each position.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def explanation_mode(self) -> AbstractContextManager[nn.Module]:
        """Return a context manager (or decorator) in which the gradient of a logit is the dynamic linear W(x)."""
        return explanation_mode(self)

    def explain(
        self, in_tensor: Tensor, idx: int | None = None, *, smooth: int = 15, alpha_percentile: float = 99.5
    ) -> dict[str, int | Tensor | np.ndarray]:
        """Explain one image.

        Args:
            in_tensor: ``(1, 6, H, W)`` in [0, 1]. It is not modified.
            idx: Class to explain; ``None``: the predicted class.
            smooth: Kernel size of the average pooling of the color image's opacity.
            alpha_percentile: Percentile of the opacity that is shown as fully opaque, in [0, 100].

        Returns:
            ``prediction`` (int), ``explained_class_idx`` (int), ``dynamic_linear_weights`` W(x) ``(1, 6, H, W)``,
            ``contribution_map`` ``(1, H, W)`` and ``explanation`` (RGBA array ``(H, W, 4)`` in [0, 1]).

        Raises:
            ValueError: ``in_tensor`` is not one image, ``idx`` is out of range, or the model takes a number of channels
                other than 6, for which there is no color image.
        """
        self._check_explainable(in_tensor)
        result = explain(self, in_tensor, idx)
        return official_dict(result, in_tensor, smooth=smooth, alpha_percentile=alpha_percentile)

    def _check_explainable(self, in_tensor: Tensor) -> None:
        shape = f"(1, {self.in_chans}, H, W)"
        if self.in_chans != 6:
            raise ValueError(
                "model.explain makes a color image of 6 channels [r, g, b, 1-r, 1-g, 1-b], but this model takes "
                f"{shape}: bcos_train.explain returns its W(x) and contribution map"
            )
        if in_tensor.ndim != 4 or in_tensor.shape[0] != 1:
            raise ValueError(f"explain takes one image {shape}, got {tuple(in_tensor.shape)}; see bcos_train.explain")
        if in_tensor.shape[1] != self.in_chans:
            raise ValueError(
                f"explain takes one image {shape}, got {tuple(in_tensor.shape)}: a B-cos network's input is "
                "[r, g, b, 1-r, 1-g, 1-b]; model.transform converts an image to it"
            )

    def get_classifier(self) -> nn.Module:
        """Return the module that computes class scores from features."""
        raise NotImplementedError

    def get_feature_extractor(self) -> nn.Module:
        """Return a module that computes ``forward_features`` and shares its parameters with this model."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with random weights.

        Args:
            num_classes: K; 0 removes the classifier: the model then returns ``(N, head_hidden_size)``.
            global_pool: ``"avg"``; with 0 classes also ``""``: the model then returns the vector of each position.
                ``None``: unchanged.

        Raises:
            ValueError: ``num_classes`` is negative, or ``global_pool`` is another value.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing: recompute each block's activations in the backward pass.

        Outputs, gradients and running statistics are unchanged; see :mod:`bcos_train.model.grad_checkpointing`.

        Raises:
            ValueError: The network has no blocks.
        """
        set_grad_checkpointing(self, enable)

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Return the parameter groups of timm's layer-wise learning rate decay, from the stem to the head.

        Args:
            coarse: One group per stage instead of one per block.
        """
        raise NotImplementedError


def check_images(x: Tensor, in_chans: int, min_size: int, model_name: str) -> None:
    """Raise a ValueError unless ``x`` is floating-point ``(N, in_chans, H, W)`` with H and W at least ``min_size``."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"the model takes (N, {in_chans}, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"the model takes floating-point images, got {x.dtype}: model.transform converts an image to its input"
        )
    if min(x.shape[2:]) < min_size:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} is too small: {model_name} takes at least {min_size}x{min_size}"
        )


def resolve_pooling(num_classes: int, global_pool: str | None, current: str = "avg") -> str:
    """Return the pooling of a new head: ``global_pool``, or the current one for ``None``.

    Raises:
        ValueError: ``num_classes`` is negative, or the pooling is neither ``"avg"`` nor, without classes, ``""``.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: at least 0")
    pooling = current if global_pool is None else global_pool
    if pooling == "" and num_classes:
        raise ValueError(f"global_pool='' (no average) requires num_classes=0, got {num_classes}; with classes, 'avg'")
    if pooling not in ("avg", ""):
        raise ValueError(
            f"global_pool={pooling!r}{suggest(pooling, ['avg'])}: 'avg', or with num_classes=0 '' for no average"
        )
    return pooling
