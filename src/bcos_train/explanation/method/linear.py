"""Gradient-based linear explanations: W(x) of B-cos networks, input x gradient, gradient.

Source: Böhle et al., CVPR 2022, arXiv 2205.10268, eq. 13; the relative form is the one of the published
localization scores of networks trained with cross-entropy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import CannotExplain, attribution_context, select_targets, target_gradients
from bcos_train.explanation.mode import explanation_mode

__all__ = ["Bcos", "Gradient", "InputXGradient"]


def _input_x_gradient(model: nn.Module, x: Tensor, targets: Tensor, relative: bool = False) -> Tensor:
    """Compute x times the gradient of each target's logit, or of its difference from the mean logit: (N, T, H, W)."""
    leaf = x.requires_grad_()
    logits = model(leaf)
    if relative:
        logits = logits - logits.mean(1, keepdim=True)
    selected = select_targets(logits, targets)
    return torch.stack([(leaf.detach() * gradient).sum(1) for gradient in target_gradients(selected, leaf)], dim=1)


@dataclass(frozen=True)
class Bcos:
    """Compute W(x) * x, each pixel's contribution to the logit. All targets of a batch share one forward pass.

    Args:
        relative: Explain the logit minus the mean of all logits: evidence for this class relative to the others.

    Raises:
        CannotExplain: The model has no B-cos layers.
    """

    relative: bool = False

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if not any(callable(getattr(module, "set_explanation_mode", None)) for module in model.modules()):
            raise CannotExplain(f"{type(model).__name__} has no B-cos layers: its gradient is no W(x); see ixg")
        with attribution_context(model, x, targets) as (x, targets), explanation_mode(model):
            return _input_x_gradient(model, x, targets, self.relative)


@dataclass(frozen=True)
class InputXGradient:
    """Compute x times the true gradient (Shrikumar et al., 2016, arXiv 1605.01713)."""

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets):
            return _input_x_gradient(model, x, targets)


@dataclass(frozen=True)
class Gradient:
    """Compute the true gradient, signed and summed over the channels (Simonyan et al., 2014, arXiv 1312.6034)."""

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets):
            leaf = x.requires_grad_()
            selected = select_targets(model(leaf), targets)
            return torch.stack([gradient.sum(1) for gradient in target_gradients(selected, leaf)], dim=1)
