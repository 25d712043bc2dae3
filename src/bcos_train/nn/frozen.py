"""A network whose weights stay as they are: what depends on them alone is computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from bcos_train.nn.conv import BcosConv2d
from bcos_train.nn.norm import BatchNormUncentered2d
from bcos_train.nn.observers import is_hooked
from bcos_train.nn.unit_weight import FROZEN, Freezable

__all__ = ["frozen_weights", "live_weights"]


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """For inference and explanations: inside, nothing is computed anew that depends on the weights alone.

    All weights are scaled to unit norm once. An uncentred batch norm in evaluation mode multiplies each channel by a
    constant s; where it follows a B-cos convolution with B = 2, the convolution takes the constant over: with
    sign(s) sqrt(abs(s)) ŵ in the place of ŵ its output is s times as large, exactly, and so is its W(x). The norm then
    passes its input on. (Not with another B, where the cosine counts by another power; nor with MaxOut, whose choice a
    negative s would turn round; nor where a hook waits for either of the two. Inside, a hook on them sees the values as
    they have been divided up: register it before.)

    Outputs and explanations of the model are those of outside to rounding. Changes of the weights aren't seen inside,
    and no gradient reaches them; a norm that has been folded can't be put into training mode there, nor the model be
    moved or cast. All this holds for calls from this thread; other threads, copies of the model, and what is compiled
    or transformed (`torch.compile`, `torch.func`) use the weights as they are. Blocks nest.

    A module tells which others it applies one after the other, with nothing else between them and no other use of
    what they give, in a method `chains() -> Iterable[Sequence[Module]]`; norms of other modules are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, Freezable) and module.frozen is None]
    norms: list[BatchNormUncentered2d] = []
    try:
        # Tensors made in inference mode could not be used for explanations.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                FROZEN.weights[layer] = layer.weight_in_use()
            for conv, norm in _foldable_pairs(model, layers):
                FROZEN.weights[conv.linear] = _scaled(FROZEN.weights[conv.linear], norm.inference_scale())
                FROZEN.norms.add(norm)
                norms.append(norm)
        yield
    finally:
        for layer in layers:
            FROZEN.weights.pop(layer, None)
        FROZEN.norms.difference_update(norms)


@contextmanager
def live_weights() -> Iterator[None]:
    """Within `frozen_weights`, use the weights as they are after all."""
    kept = FROZEN.weights, FROZEN.norms
    FROZEN.weights, FROZEN.norms = {}, set()
    try:
        yield
    finally:
        FROZEN.weights, FROZEN.norms = kept


def _scaled(unit: Tensor, scale: Tensor) -> Tensor:
    root = scale.sign() * scale.abs().sqrt()
    return (unit * root.view(-1, 1, 1, 1)).to(unit.dtype)


def _foldable_pairs(model: nn.Module, layers: Sequence[Freezable]) -> list[tuple[BcosConv2d, BatchNormUncentered2d]]:
    if any(isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in model.modules()):
        # What is compiled uses the weights as they are, and of a pair only one may have been.
        return []
    # A module that is in several places is not always followed by the same one.
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    fresh = set(layers)
    pairs = []
    for conv, norm in _neighbours(model):
        if not (isinstance(conv, BcosConv2d) and isinstance(norm, BatchNormUncentered2d)):
            continue
        is_alone = places[conv] == places[norm] == 1 and conv.linear in fresh
        if is_alone and conv.is_homogeneous() and norm.is_scaling() and not is_hooked(norm):
            pairs.append((conv, norm))
    return pairs


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        if callable(chains := getattr(module, "chains", None)):
            for chain in chains():
                yield from pairwise(chain)
