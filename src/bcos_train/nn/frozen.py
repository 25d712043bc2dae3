"""A network whose weights stay as they are: what depends on them alone is computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from bcos_train.nn.backend import is_hooked
from bcos_train.nn.conv import BcosConv2d
from bcos_train.nn.functional import normalise_weight
from bcos_train.nn.norm import BatchNormUncentered2d
from bcos_train.nn.unit_weight import UnitWeight

__all__ = ["frozen_weights"]


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """For inference and explanations: inside, nothing is computed anew that depends on the weights alone.

    All weights are scaled to unit norm once. An uncentred batch norm in evaluation mode multiplies each channel by a
    constant s; where it follows a B-cos convolution with B = 2, the convolution takes the constant over: with
    sign(s) sqrt(abs(s)) ŵ in the place of ŵ its output is s times as large, exactly, and so is its W(x). The norm then
    passes its input on. (Not with another B, where the cosine counts by another power; nor with MaxOut, whose choice a
    negative s would turn round; nor where a hook waits for either of the two.)

    Outputs and explanations of the model are those of outside to rounding. Changes of the weights aren't seen inside,
    and no gradient reaches them; a norm that has been folded can't be put into training mode there. Blocks nest; copies
    of the model that are made inside keep the frozen weights.

    A module tells which others it applies one after the other, with nothing else between them and no other use of
    what they give, in a method `chains() -> Iterable[Sequence[Module]]`; norms of other modules are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, UnitWeight) and module.frozen is None]
    norms: list[BatchNormUncentered2d] = []
    try:
        with torch.no_grad():
            for layer in layers:
                layer.frozen = normalise_weight(layer.weight)
            for conv, norm in _foldable_pairs(model, layers):
                conv.linear.frozen = _scaled(conv.linear.frozen, norm.inference_scale())
                norm.is_folded = True
                norms.append(norm)
        yield
    finally:
        # What they shadow in the class takes effect again.
        for layer in layers:
            layer.__dict__.pop("frozen", None)
        for norm in norms:
            norm.__dict__.pop("is_folded", None)


def _scaled(unit: Tensor | None, scale: Tensor) -> Tensor:
    assert unit is not None
    root = scale.sign() * scale.abs().sqrt()
    return (unit * root.view(-1, 1, 1, 1)).to(unit.dtype)


def _foldable_pairs(model: nn.Module, layers: Sequence[UnitWeight]) -> list[tuple[BcosConv2d, BatchNormUncentered2d]]:
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
