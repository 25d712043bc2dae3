"""Norms by name, and the wrappers that take away the bias or both affine parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from bcos_train.nn.norm.group import (
    DetachableGNInstanceNorm2d,
    DetachableGNLayerNorm2d,
    DetachableGroupNorm2d,
    DetachablePositionNorm2d,
    GNInstanceNormUncentered2d,
    GNLayerNormUncentered2d,
    GroupNormUncentered2d,
    PositionNormUncentered2d,
)
from bcos_train.nn.norm.running import AllNorm2d, AllNormUncentered2d, BatchNorm2d, BatchNormUncentered2d
from bcos_train.suggest import suggest

__all__ = ["NORM_NAMES", "NoBias", "NormFactory", "Unaffine", "make_norm"]

NormFactory = Callable[..., nn.Module]  # called with the number of channels first


def _without(norm: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        if getattr(norm, name, None) is None:
            raise ValueError(f"{type(norm).__name__} has no {name} to take away: was it made with affine=False?")
        setattr(norm, name, None)
    return norm


# Classes rather than closures, so that a model that keeps its norm factory can be pickled.
@dataclass(frozen=True)
class NoBias:
    """`NoBias(make)(64)` is `make(64)` without its bias. Arguments are those of `make`.

    Raises:
        ValueError: on the call, if the norm has no bias anyway.
    """

    make: NormFactory

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _without(self.make(*args, **kwargs), ("bias",))


@dataclass(frozen=True)
class Unaffine:
    """`Unaffine(make)(64)` is `make(64)` without its weight and bias. Arguments are those of `make`.

    Raises:
        ValueError: on the call, if the norm lacks one of them anyway.
    """

    make: NormFactory

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _without(self.make(*args, **kwargs), ("bias", "weight"))


_NORMS: dict[str, NormFactory] = {
    "an": AllNorm2d,
    "bn": BatchNorm2d,
    "gn": partial(DetachableGroupNorm2d, 2),
    "in": DetachableGNInstanceNorm2d,
    "ln": DetachableGNLayerNorm2d,
    "pn": DetachablePositionNorm2d,
    "anu": AllNormUncentered2d,
    "bnu": BatchNormUncentered2d,
    "gnu": partial(GroupNormUncentered2d, 2),
    "inu": GNInstanceNormUncentered2d,
    "lnu": GNLayerNormUncentered2d,
    "pnu": PositionNormUncentered2d,
}
_SUFFIXES: dict[str, Callable[[NormFactory], NormFactory]] = {
    "": lambda make: make,
    "-linear": NoBias,
    "-unaffine": Unaffine,
}
NORM_NAMES = tuple(_NORMS)


def make_norm(name: str) -> NormFactory:
    """The norm called `name`, to be called with the number of channels.

    Args:
        name: one of `NORM_NAMES` (all, batch, group with two groups, instance, layer, position; with `u`
            uncentered), with nothing, "-linear" (no bias) or "-unaffine" (neither weight nor bias) after it; or "none"
            for `nn.Identity`. "bnu-linear" and "pn-linear" are the norms of the published ImageNet models.

    Raises:
        ValueError: an unknown name; the message has the nearest known one.
    """
    if name == "none":
        return nn.Identity
    known = {norm + suffix: (norm, suffix) for norm in _NORMS for suffix in _SUFFIXES}
    if name not in known:
        raise ValueError(
            f"norm {name!r} is unknown{suggest(name, [*known, 'none'])} (known are none and {', '.join(NORM_NAMES)}, "
            "each also with -linear, without a bias, or -unaffine)"
        )
    norm, suffix = known[name]
    return _SUFFIXES[suffix](_NORMS[norm])
