"""The explanations of B-cos networks: contributions of the linear map that the network applied.

Source: Böhle et al., CVPR 2022, arXiv 2205.10268, eq. 13; the relative form is the one with which the published
localisation scores of networks with a cross-entropy were computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import CannotExplain, explaining, gradients, select
from bcos_train.explanation.mode import explanation_mode

__all__ = ["Bcos", "Gradient", "InputXGradient"]


def _input_x_gradient(model: nn.Module, x: Tensor, targets: Tensor, relative: bool = False) -> Tensor:
    """x times the gradient of each target's logit, or of its distance from the mean logit; (N, T, H, W)."""
    leaf = x.requires_grad_()
    logits = model(leaf)
    if relative:
        logits = logits - logits.mean(1, keepdim=True)
    selected = select(logits, targets)
    return torch.stack([(leaf.detach() * gradient).sum(1) for gradient in gradients(selected, leaf)], dim=1)


@dataclass(frozen=True)
class Bcos:
    """W(x) * x: what every pixel adds to the logit. One forward pass serves all targets of a batch.

    Args:
        relative: explain the logit less the mean of all logits: what speaks for this class more than for the others.

    Raises:
        CannotExplain: the model has no B-cos layers.
    """

    relative: bool = False

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if not any(callable(getattr(module, "set_explanation_mode", None)) for module in model.modules()):
            raise CannotExplain(f"{type(model).__name__} has no B-cos layers: its gradient is no W(x); see ixg")
        with explaining(model, x, targets) as (x, targets), explanation_mode(model):
            return _input_x_gradient(model, x, targets, self.relative)


@dataclass(frozen=True)
class InputXGradient:
    """x times the true gradient (Shrikumar et al., 2016, arXiv 1605.01713)."""

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets):
            return _input_x_gradient(model, x, targets)


@dataclass(frozen=True)
class Gradient:
    """The true gradient, signed and summed over the channels (Simonyan et al., 2014, arXiv 1312.6034)."""

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets):
            leaf = x.requires_grad_()
            selected = select(model(leaf), targets)
            return torch.stack([gradient.sum(1) for gradient in gradients(selected, leaf)], dim=1)
