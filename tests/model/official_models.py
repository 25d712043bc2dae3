"""The official models that the project's are compared with."""

from functools import partial
from typing import Any

import bcos.models.resnet
import torch
from bcos.modules import BcosConv2d, norms
from torch import Tensor, nn

from bcos_train import list_models

RESNETS = [name for name in list_models() if "res" in name and not name.startswith("standard_")]
#: The ImageNet networks have the plain names in the official code, the CIFAR-10 ones the prefix `cifar10_`.
CIFAR_RESNETS = [name for name in RESNETS if not hasattr(bcos.models.resnet, name)]

OFFICIAL_NORMS: dict[str, Any] = {
    "an": norms.AllNorm2d,
    "bn": norms.BatchNorm2d,
    "gn": partial(norms.DetachableGroupNorm2d, 2),
    "in": norms.DetachableGNInstanceNorm2d,
    "ln": norms.DetachableGNLayerNorm2d,
    "pn": norms.DetachablePositionNorm2d,
    "anu": norms.AllNormUncentered2d,
    "bnu": norms.BatchNormUncentered2d,
    "gnu": partial(norms.GroupNormUncentered2d, 2),
    "inu": norms.GNInstanceNormUncentered2d,
    "lnu": norms.GNLayerNormUncentered2d,
    "pnu": norms.PositionNormUncentered2d,
}
OFFICIAL_SUFFIXES: dict[str, Any] = {"": lambda norm: norm, "-linear": norms.NoBias, "-unaffine": norms.Unaffine}


def official_norm(name: str) -> Any:
    """The official norm for a name of the norm study."""
    if name == "none":
        return nn.Identity
    norm, dash, suffix = name.partition("-")
    return OFFICIAL_SUFFIXES[dash + suffix](OFFICIAL_NORMS[norm])


def build_official(
    name: str, norm: str = "bnu-linear", b: float = 2, max_out: int | None = None, **options: Any
) -> Any:
    is_cifar = name in CIFAR_RESNETS
    if max_out is None:
        max_out = 2 if is_cifar else 1
    build = getattr(bcos.models.resnet, f"cifar10_{name}" if is_cifar else name)
    conv = partial(BcosConv2d, b=b, max_out=max_out)
    return build(norm_layer=official_norm(norm), conv_layer=conv, **options)


def images(size: int, n: int = 2, in_chans: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random encoded images ``[x, 1 - x]``, (n, in_chans, size, size); plain ones if ``in_chans`` is odd."""
    generator = torch.Generator().manual_seed(seed)
    if in_chans % 2:
        return torch.rand(n, in_chans, size, size, generator=generator, dtype=dtype)
    x = torch.rand(n, in_chans // 2, size, size, generator=generator, dtype=dtype)
    return torch.cat([x, 1 - x], dim=1)


def perturb_(model: nn.Module, seed: int = 0) -> None:
    """Make the norms' weights and biases differ from channel to channel; they begin as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(noise - 0.5, alpha=0.4)


def relative_error(ours: Tensor, official: Tensor) -> float:
    """Largest difference over the largest magnitude; of zeros the difference itself."""
    assert ours.shape == official.shape
    difference, scale = (ours - official).abs().max(), official.abs().max()
    return (difference / scale if scale > 0 else difference).item()
