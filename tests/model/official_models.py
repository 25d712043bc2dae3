"""The official convolutional networks that the project's are compared with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import bcos.models.convnext
import bcos.models.densenet
import bcos.models.resnet
import bcos.models.vgg
import torch
from bcos.modules import BcosConv2d, norms
from torch import Tensor, nn

from bcos_train import list_models

MODULES = (bcos.models.resnet, bcos.models.densenet, bcos.models.vgg, bcos.models.convnext)
PREFIXES = ("resn", "wide_resn", "densenet", "vgg", "convnext")
CONV_NETS = [name for name in list_models() if name.startswith(PREFIXES)]


def official_names(name: str) -> list[str]:
    """Of these names one is that of the official builder.

    A row `_long` is the plain network with another recipe, `convnext_*_bnu` the plain one with another norm; the
    CIFAR-10 networks have the prefix `cifar10_`.
    """
    base = name.removesuffix("_long")
    if name.startswith("convnext"):
        base = base.removesuffix("_bnu")
    return [base, f"cifar10_{base}"]


def official_builder(name: str) -> Callable[..., Any]:
    names = official_names(name)
    (builder,) = (getattr(module, official) for module in MODULES for official in names if hasattr(module, official))
    return builder


CIFAR_NETS = [name for name in CONV_NETS if official_builder(name).__name__.startswith("cifar10_")]
RESNETS = [name for name in CONV_NETS if "res" in name]

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


def official_defaults(name: str) -> dict[str, Any]:
    """What the official configurations of the published networks, and of the norm study, give the builder."""
    options: dict[str, Any] = {"conv_layer": partial(BcosConv2d, b=2, max_out=2 if name in CIFAR_NETS else 1)}
    if name.startswith("convnext"):
        options["norm_layer"] = official_norm("bnu-linear") if name.endswith("_bnu") else None
    elif not name.startswith("vgg") or name.endswith("_bnu"):
        # The plain VGGs pass their norm, none, themselves.
        options["norm_layer"] = official_norm("bnu-linear")
    if name in ("resnet50_long", "resnet152_long"):
        options["stochastic_depth_prob"] = 0.1
    return options


def build_official(name: str, norm: str | None = None, b: float = 2, max_out: int | None = None, **options: Any) -> Any:
    """The official network of that name; `norm`, `b` and `max_out` as in ours, the other options are handed on."""
    defaults = official_defaults(name)
    if norm is not None:
        defaults["norm_layer"] = official_norm(norm)
    if max_out is None:
        max_out = defaults["conv_layer"].keywords["max_out"]
    defaults["conv_layer"] = partial(BcosConv2d, b=b, max_out=max_out)
    return official_builder(name)(**{**defaults, **options})


def narrow_official_convnext(name: str, channels: tuple[int, ...], **options: Any) -> Any:
    """The ConvNeXts' scale of the residual branch has no option for its width: a ConvNeXt of other channels."""
    with torch.device("meta"):
        full: Any = build_official(name)
    depths = [len(stage) for stage in full.features[2::2]]
    drop_probs = [module.p for module in full.modules() if hasattr(module, "p")]
    setting = [
        bcos.models.convnext.CNBlockConfig(width, following, depth)
        for width, following, depth in zip(channels, [*channels[1:], None], depths, strict=True)
    ]
    defaults = {**official_defaults(name), "stochastic_depth_prob": drop_probs[-1]}
    return bcos.models.convnext.BcosConvNeXt(setting, **{**defaults, **options})


class Narrow:
    """A layer with a fraction of the channels; those of images and classes stay.

    The same network with fewer channels, through options that the official builders take as well.
    """

    def __init__(self, layer: Callable[..., nn.Module], divisor: int, num_classes: int) -> None:
        self.layer = layer
        self.divisor = divisor
        self.kept = (6, num_classes)

    def __call__(self, *channels: int, **options: Any) -> nn.Module:
        return self.layer(*(c if c in self.kept else c // self.divisor for c in channels), **options)


def images(size: int, n: int = 2, in_chans: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random encoded images ``[x, 1 - x]``, (n, in_chans, size, size); plain ones if ``in_chans`` is odd."""
    generator = torch.Generator().manual_seed(seed)
    if in_chans % 2:
        return torch.rand(n, in_chans, size, size, generator=generator, dtype=dtype)
    x = torch.rand(n, in_chans // 2, size, size, generator=generator, dtype=dtype)
    return torch.cat([x, 1 - x], dim=1)


def without_norm(name: str) -> bool:
    """Whether the network has no norm. With B = 2 its output is zero at first: each layer squares its input's size."""
    return name.startswith("vgg") and "bnu" not in name


def calibrate_(model: nn.Module, x: Tensor) -> None:
    """Set running statistics to those of the batch, as after long training; one step moves them by a tenth."""
    norms_: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "momentum", None), float)]
    momenta = [module.momentum for module in norms_]
    for module in norms_:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for module, momentum in zip(norms_, momenta, strict=True):
        module.momentum = momentum


def perturb_(model: nn.Module, seed: int = 0) -> None:
    """Make the parameters of a number a channel differ from channel to channel; they begin alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.numel() == parameter.shape[0]:
            noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(noise - 0.5, alpha=0.4)


def relative_error(ours: Tensor, official: Tensor) -> float:
    """Largest difference over the largest magnitude; of zeros the difference itself."""
    assert ours.shape == official.shape
    difference, scale = (ours - official).abs().max(), official.abs().max()
    return (difference / scale if scale > 0 else difference).item()
