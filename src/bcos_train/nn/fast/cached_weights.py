"""Cache unit-norm weights and fold norms while weights are fixed."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from bcos_train.nn.fast.dispatch import CACHE, has_hooks
from bcos_train.nn.functional import normalize_weight, statistics_dtype

if TYPE_CHECKING:
    from bcos_train.nn.conv import BcosConv2d
    from bcos_train.nn.norm import BatchNormUncentered2d

__all__ = ["cached_weights", "live_weights"]


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Cache everything that depends on the weights alone, for inference and explanations.

    All weights are scaled to unit norm once. An uncentered batch norm in evaluation mode multiplies each channel by a
    constant s. Where it follows a B-cos convolution with B = 2, it is folded into it: with sign(s) sqrt(|s|) ŵ in place
    of ŵ the output of the convolution is s times as large, exactly, and so is its W(x); the norm then returns its
    input. (Not with another B, where the cosine enters with another power; nor with MaxOut, whose choice a negative s
    would reverse; nor where one of the two has a hook. Hooks registered inside see the folded values: register them
    before.)

    Outputs and explanations of the model are those of outside up to rounding. Weights must not change inside, and get
    no gradient; a folded norm can't be put into training mode, nor the model be moved or cast. All this holds for calls
    from this thread: other threads, copies of the model, and what is compiled or transformed (`torch.compile`,
    `torch.func`) use the weights as they are. Blocks nest.

    A module declares which of its children it applies in sequence, with nothing else in between and no other use of
    their outputs, in a method ``chains() -> Iterable[Sequence[Module]]``; other norms are not folded.
    """
    weights: dict[nn.Module, Tensor] = {}
    norms: set[nn.Module] = set()
    # Tensors made in inference mode could not be used for explanations.
    with torch.inference_mode(False), torch.no_grad():
        weights = {module: weight for module, weight in _weights_in_use(model) if module not in CACHE.weights}
        for conv, norm in _foldable_pairs(model, weights):
            weights[conv.linear] = _scaled(weights[conv.linear], _inference_scale(norm))
            norms.add(norm)
    CACHE.weights.update(weights)
    CACHE.norms.update(norms)
    try:
        yield
    finally:
        for module in weights:
            CACHE.weights.pop(module, None)
        CACHE.norms.difference_update(norms)


@contextmanager
def live_weights() -> Iterator[None]:
    """Ignore enclosing `cached_weights`: use the weights as they are, with gradients."""
    outside = CACHE.weights, CACHE.norms
    CACHE.weights, CACHE.norms = {}, set()
    try:
        yield
    finally:
        CACHE.weights, CACHE.norms = outside


def _weights_in_use(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """The modules that can compute with a cached weight, and that weight."""
    # Imported here because these modules import the seam, which imports this one.
    from bcos_train.nn.conv import NormedConv2d
    from bcos_train.nn.layer import BcosLayer
    from bcos_train.nn.linear import Linear, NormedLinear

    for module in model.modules():
        if isinstance(module, NormedConv2d | NormedLinear):
            yield module, normalize_weight(module.weight)
        elif isinstance(module, Linear):
            yield module, module.weight.detach().clone()
        elif isinstance(module, BcosLayer) and not module.normalize_weight:
            linear: nn.Linear = module.linear  # type: ignore[assignment]
            yield linear, linear.weight.detach().clone()


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    root = scale.sign() * scale.abs().sqrt()
    return (weight * root.view(-1, 1, 1, 1)).to(weight.dtype)


def _inference_scale(norm: "BatchNormUncentered2d") -> Tensor:
    """Factor of each channel in evaluation mode, (C,), in float32 or float64."""
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.to(statistics_dtype(norm.running_var)) + norm.eps)
    return scale if norm.weight is None else scale * norm.weight


def _foldable_pairs(
    model: nn.Module, weights: dict[nn.Module, Tensor]
) -> list[tuple["BcosConv2d", "BatchNormUncentered2d"]]:
    from bcos_train.nn.conv import BcosConv2d
    from bcos_train.nn.norm import BatchNormUncentered2d

    if any(isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in model.modules()):
        # Compiled modules use the live weights, and only one of a pair may have been compiled.
        return []
    # A module that is registered in several places is not always followed by the same one.
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    pairs = []
    for conv, norm in _neighbors(model):
        if not (isinstance(conv, BcosConv2d) and isinstance(norm, BatchNormUncentered2d)):
            continue
        is_alone = places[conv] == places[norm] == 1 and conv.linear in weights
        is_scaling = norm.bias is None and not norm.uses_batch_statistics
        if is_alone and is_scaling and _is_homogeneous(conv) and not has_hooks(norm):
            pairs.append((conv, norm))
    return pairs


def _is_homogeneous(conv: "BcosConv2d") -> bool:
    """True if sign(s) sqrt(|s|) times the weight gives s times the output."""
    is_square = not isinstance(conv.b, Tensor) and conv.b == 2 and conv.max_out == 1 and conv.linear.bias is None
    return is_square and conv.backend != "reference" and not (has_hooks(conv) or has_hooks(conv.linear))


def _neighbors(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        if callable(chains := getattr(module, "chains", None)):
            for chain in chains():
                yield from pairwise(chain)
