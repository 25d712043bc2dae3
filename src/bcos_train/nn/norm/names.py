"""Norm layers by name, and wrappers that remove the bias or both affine parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
from bcos_train.utils.suggestions import suggest

__all__ = ["NORM_NAMES", "NoBias", "NormFactory", "Unaffine", "make_norm"]

NormFactory = Callable[..., nn.Module]  # first argument: the number of channels


# A class rather than closures, so that a model with a norm factory as an attribute can be pickled.
@dataclass(frozen=True)
class _WithoutParameters:
    names: tuple[str, ...]
    make: NormFactory

    def __call__(self, *args: object, **kwargs: object) -> nn.Module:
        norm = self.make(*args, **kwargs)
        for name in self.names:
            if getattr(norm, name, None) is None:
                raise ValueError(f"{type(norm).__name__} has no {name} to remove: was it built with affine=False?")
            setattr(norm, name, None)
        return norm


def NoBias(make: NormFactory) -> NormFactory:
    """Norm factory that removes the bias: ``NoBias(make)(64)`` is ``make(64)`` without it; a ValueError without one."""
    return _WithoutParameters(("bias",), make)


def Unaffine(make: NormFactory) -> NormFactory:
    """As `NoBias`, removing weight and bias."""
    return _WithoutParameters(("bias", "weight"), make)


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
    """Return the norm factory called ``name``; its first argument is the number of channels.

    Args:
        name: One of ``NORM_NAMES`` (all, batch, group with two groups, instance, layer, position; with a final ``u``
            uncentered), optionally followed by ``"-linear"`` (no bias) or ``"-unaffine"`` (neither weight nor bias);
            or ``"none"`` for ``nn.Identity``. The published ImageNet models use ``"bnu-linear"`` and ``"pn-linear"``.

    Raises:
        ValueError: Unknown name; the message names the nearest known one.
    """
    if name == "none":
        return nn.Identity
    known = {norm + suffix: (norm, suffix) for norm in _NORMS for suffix in _SUFFIXES}
    if name not in known:
        raise ValueError(
            f"unknown norm {name!r}{suggest(name, [*known, 'none'])}; allowed are none and {', '.join(NORM_NAMES)}, "
            "each also with -linear (no bias) or -unaffine (neither weight nor bias)"
        )
    norm, suffix = known[name]
    return _SUFFIXES[suffix](_NORMS[norm])
