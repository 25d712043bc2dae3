"""What every B-cos model can do besides ``forward``."""

from collections.abc import Callable
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
from bcos_train.model.transform import InferenceTransform


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

        With ``pre_logits`` to the classifier's input, averaged over the positions: ``(N, head_hidden_size)``.
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
            ValueError: Not one four-dimensional image, or ``idx`` out of range.
        """
        if in_tensor.ndim != 4 or in_tensor.shape[0] != 1:
            raise ValueError(
                f"explain takes one image (1, 6, H, W), got {tuple(in_tensor.shape)}; see bcos_train.explain"
            )
        if in_tensor.shape[1] != self.in_chans:
            raise ValueError(
                f"the model takes {self.in_chans} channels, got {in_tensor.shape[1]}: a B-cos network's input is "
                "[r, g, b, 1-r, 1-g, 1-b], which model.transform makes of an image"
            )
        result = explain(self, in_tensor, idx)
        return official_dict(result, in_tensor, smooth=smooth, alpha_percentile=alpha_percentile)

    def get_classifier(self) -> nn.Module:
        """The module that turns features into class scores."""
        raise NotImplementedError

    def get_feature_extractor(self) -> nn.Module:
        """A module that computes ``forward_features``, sharing its parameters with this model."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier with random weights in the place of the present one.

        Args:
            num_classes: K; 0 leaves the classifier out: the model then gives ``(N, head_hidden_size)``.

        Raises:
            ValueError: A negative number.
        """
        raise NotImplementedError
