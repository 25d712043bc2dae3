"""Gradients with other rules for the nonlinear layers: guided backpropagation and DeepLIFT, as captum computes them."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import CannotExplain, explaining, gradients, library, select

__all__ = ["DeepLift", "GuidedBackprop"]


#: Attributes that DeepLIFT adds to a module and deletes in the backward pass, if there is one.
_NOTES = {"input", "output"}


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Without captum's warnings about its hooks, and without what it may leave behind on modules."""
    own = {module: {name: vars(module)[name] for name in _NOTES & vars(module).keys()} for module in model.modules()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Setting (forward, )?backward hooks")
            yield
    finally:
        for module, values in own.items():
            for name in _NOTES & vars(module).keys():
                del vars(module)[name]
            vars(module).update(values)


@dataclass(frozen=True)
class GuidedBackprop:
    """The gradient with negative parts cut off at every ReLU (Springenberg et al., 2015, arXiv 1412.6806).

    Only ReLUs that are modules are seen; one that is called as a function passes the gradient on as it is.

    Raises:
        CannotExplain: the model has no ReLU module.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if not any(isinstance(module, nn.ReLU) for module in model.modules()):
            raise CannotExplain(
                f"{type(model).__name__} has no nn.ReLU, whose gradient guided backpropagation changes: "
                "all that is left is the gradient; see gradient"
            )
        captum = library("captum.attr", "captum")
        with explaining(model, x, targets) as (x, targets), _as_found(model):
            leaf = x.requires_grad_()

            def of_all_targets(forward: nn.Module, inputs: tuple[Tensor], *_: Any) -> tuple[Tensor, ...]:
                return tuple(gradients(select(forward(*inputs), targets), *inputs))

            # Captum sets the hooks and removes them. Its own gradient function takes one target at a time.
            method = captum.GuidedBackprop(model)
            method.gradient_func = of_all_targets
            return torch.stack([gradient.sum(1) for gradient in method.attribute((leaf,))], dim=1)


@dataclass(frozen=True)
class DeepLift:
    """Differences of activations from those for a zero input, passed back by the rescale rule.

    Source: Shrikumar et al., 2017, arXiv 1704.02685. Captum has rules for ReLU, ELU, LeakyReLU, Sigmoid, Tanh,
    Softplus, Softmax and max pooling as modules; whatever else is not linear counts with its gradient. It has none for
    B-cos layers, for which it gives x times the gradient: what the official evaluation lists for them under DeepLIFT,
    and an error here.

    Raises:
        CannotExplain: the model uses no module that captum has a rule for.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        captum = library("captum.attr", "captum")
        rules = tuple(library("captum.attr._core.deep_lift", "captum").SUPPORTED_NON_LINEAR)
        with explaining(model, x, targets) as (x, targets):
            calls = _count_calls(model, x[:1], targets[:1], rules)
            if not calls:
                raise CannotExplain(
                    f"{type(model).__name__} uses no layer for which captum's DeepLIFT has a rule: without one it is x "
                    "times the gradient; see ixg"
                )
            leaf = x.requires_grad_()
            maps = []
            with _each_used_once(model, calls), _as_found(model):
                # A pass for each target: captum forgets the activations in the backward pass.
                for target in targets.unbind(1):
                    maps.append(captum.DeepLift(model).attribute(leaf, target=target).detach().sum(1))
            return torch.stack(maps, dim=1)


@torch.no_grad()
def _count_calls(
    model: nn.Module, x: Tensor, targets: Tensor, kinds: tuple[type[nn.Module], ...]
) -> Counter[nn.Module]:
    """How often each module of these kinds is called in a forward pass."""
    calls: Counter[nn.Module] = Counter()
    found = [module for module in model.modules() if type(module) in kinds]
    handles = [module.register_forward_hook(lambda module, *_: calls.update([module])) for module in found]
    try:
        select(model(x), targets)  # for its checks
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _InTurn(nn.Module):
    """Copies of a module, one for each place where a forward pass calls it."""

    def __init__(self, module: nn.Module, n_calls: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(n_calls))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        module = self.copies[self.turn]
        self.turn = (self.turn + 1) % len(self.copies)
        return module(x)


@contextmanager
def _each_used_once(model: nn.Module, calls: Counter[nn.Module]) -> Iterator[None]:
    """Captum notes the activations on the module itself, so one that is called again (ResNet's ReLU) needs copies."""
    in_turn: dict[nn.Module | None, nn.Module] = {
        module: _InTurn(module, count) for module, count in calls.items() if count > 1
    }
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    try:
        for parent, name, child in places:
            parent._modules[name] = in_turn.get(child, child)
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
