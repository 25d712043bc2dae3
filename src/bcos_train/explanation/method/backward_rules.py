"""Gradients with modified rules for nonlinear layers: guided backpropagation and DeepLIFT, by captum."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_train.explanation.hooks import forward_hooks
from bcos_train.explanation.method.base import (
    CannotExplain,
    attribution_context,
    import_optional,
    select_targets,
    target_gradients,
)

__all__ = ["DeepLift", "GuidedBackprop"]


#: Attributes that captum's DeepLIFT sets on modules, and deletes in the backward pass if there is one.
_CAPTUM_ATTRIBUTES = {"input", "output"}


@contextmanager
def _without_captum_traces(model: nn.Module) -> Iterator[None]:
    """Suppress captum's warnings about its hooks, and remove the attributes that it may leave on modules."""
    previous = {
        module: {name: vars(module)[name] for name in _CAPTUM_ATTRIBUTES & vars(module).keys()}
        for module in model.modules()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Setting (forward, )?backward hooks")
            yield
    finally:
        for module, values in previous.items():
            for name in _CAPTUM_ATTRIBUTES & vars(module).keys():
                del vars(module)[name]
            vars(module).update(values)


@dataclass(frozen=True)
class GuidedBackprop:
    """Compute the gradient with negative values set to zero at every ReLU (Springenberg et al., 2015, arXiv 1412.6806).

    Only ReLU modules take part; the gradient passes functional ReLUs as usual.

    Raises:
        CannotExplain: The model has no ReLU module.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if not any(isinstance(module, nn.ReLU) for module in model.modules()):
            raise CannotExplain(
                f"{type(model).__name__} has no nn.ReLU, whose gradient guided backpropagation changes: "
                "without one it equals the method gradient"
            )
        captum = import_optional("captum.attr", "captum")
        with attribution_context(model, x, targets) as (x, targets), _without_captum_traces(model):
            leaf = x.requires_grad_()

            def gradients_of_all_targets(forward: nn.Module, inputs: tuple[Tensor], *_: object) -> tuple[Tensor, ...]:
                return tuple(target_gradients(select_targets(forward(*inputs), targets), *inputs))

            # Captum adds and removes the hooks. Its own gradient function handles one target at a time.
            method = captum.GuidedBackprop(model)
            method.gradient_func = gradients_of_all_targets
            return torch.stack([gradient.sum(1) for gradient in method.attribute((leaf,))], dim=1)


@dataclass(frozen=True)
class DeepLift:
    """Propagate differences of activations from those for a zero input back by the rescale rule (DeepLIFT).

    Source: Shrikumar et al., 2017, arXiv 1704.02685. Captum has rules for ReLU, ELU, LeakyReLU, Sigmoid, Tanh,
    Softplus, Softmax and max pooling modules; other nonlinear layers use their gradient. For B-cos layers it has no
    rule and returns x times the gradient, which the official evaluation reports as their DeepLIFT; here it is an
    error.

    Raises:
        CannotExplain: The model uses no module for which captum has a rule.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        captum = import_optional("captum.attr", "captum")
        rules = tuple(import_optional("captum.attr._core.deep_lift", "captum").SUPPORTED_NON_LINEAR)
        with attribution_context(model, x, targets) as (x, targets):
            calls = _count_calls(model, x[:1], targets[:1], rules)
            if not calls:
                raise CannotExplain(
                    f"{type(model).__name__} uses no layer for which captum's DeepLIFT has a rule: without one it "
                    "equals x times the gradient, the method ixg"
                )
            leaf = x.requires_grad_()
            maps = []
            with _separate_copies(model, calls), _without_captum_traces(model):
                # One pass per target: captum deletes the activations in the backward pass.
                for target in targets.unbind(1):
                    maps.append(captum.DeepLift(model).attribute(leaf, target=target).detach().sum(1))
            return torch.stack(maps, dim=1)


@torch.no_grad()
def _count_calls(
    model: nn.Module, x: Tensor, targets: Tensor, module_types: tuple[type[nn.Module], ...]
) -> Counter[nn.Module]:
    """Count the calls of each module of these types in a forward pass."""
    calls: Counter[nn.Module] = Counter()
    modules = [module for module in model.modules() if type(module) in module_types]
    with forward_hooks(modules, lambda module, *_: calls.update([module])):
        select_targets(model(x), targets)  # validates logits and targets
    return calls


class _CopyPerCall(nn.Module):
    """Copies of a module, one for each of its calls in a forward pass."""

    def __init__(self, module: nn.Module, n_calls: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(n_calls))
        self.next_copy = 0

    def forward(self, x: Tensor) -> Tensor:
        module = self.copies[self.next_copy]
        self.next_copy = (self.next_copy + 1) % len(self.copies)
        return module(x)


@contextmanager
def _separate_copies(model: nn.Module, calls: Counter[nn.Module]) -> Iterator[None]:
    """Replace modules that are called several times (ResNet's ReLU) by copies: captum stores activations on modules."""
    replacements: dict[nn.Module | None, nn.Module] = {
        module: _CopyPerCall(module, count) for module, count in calls.items() if count > 1
    }
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    try:
        for parent, name, child in places:
            parent._modules[name] = replacements.get(child, child)
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
