"""Image transforms: PIL image (RGB) -> uint8 (3, H, W). Scaling to [0, 1] and encoding follow on the device.

Images are cropped and resized as PIL images: with antialiasing, and bit-identical to the official presets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bcos_train.utils.suggestions import join_words, suggest

__all__ = [
    "Augmentation",
    "Interpolation",
    "Policy",
    "crop_flip",
    "digits_train",
    "imagenet_eval",
    "imagenet_train",
    "plain",
]

Interpolation = Literal["nearest", "bilinear", "bicubic"]
#: Largest length of an image in pixels: a config that somebody sent must not exhaust the memory.
MAX_SIZE = 4096
Policy = Literal["ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn"]


@dataclass(frozen=True)
class Augmentation:
    """The transforms of a run: everything between the data set and the encoding.

    Args:
        train: PIL image -> uint8 ``(3, H, W)``, random.
        eval: PIL image -> uint8 ``(3, H, W)``, deterministic.
        mixup_alpha, cutmix_alpha: Parameters of MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899), applied to
            whole batches; 0: off. With both on, each batch gets one of them, with equal probability.
        repetitions: Augmented versions of a sample per epoch (repeated augmentation, arXiv 1901.09335).
    """

    train: Callable[[Image.Image], Tensor]
    eval: Callable[[Image.Image], Tensor]
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    repetitions: int = 1


def plain(size: int | None = None, interpolation: Interpolation = "bilinear") -> v2.Compose:
    """No augmentation.

    Args:
        size: Resize to ``size`` × ``size`` pixels, regardless of the aspect ratio; ``None`` keeps each image's size.
    """
    steps: list[v2.Transform] = []
    if size is not None:
        check_size("size", size)
        steps.append(v2.Resize((size, size), interpolation=_interpolation(interpolation)))
    return v2.Compose([*steps, v2.PILToTensor()])


def crop_flip(size: int = 32, padding: int = 4) -> v2.Compose:
    """Horizontal flip and a ``size`` × ``size`` crop of the image padded with black: the official CIFAR-10 preset."""
    check_size("size", size)
    check_size("padding", padding, least=0)
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=padding), v2.PILToTensor()])


def digits_train(degrees: float = 10.0, translate: float = 0.1, scale: float = 0.1) -> v2.Compose:
    """Small rotations, translations and changes of scale; no flips, which would change or destroy the digit.

    Args:
        degrees: Largest rotation in either direction.
        translate: Largest translation in each direction, as a fraction of the side, in [0, 1].
        scale: The scale is drawn from [1 - ``scale``, 1 + ``scale``].
    """
    affine = v2.RandomAffine(
        degrees,
        translate=(translate, translate),
        scale=(1 - scale, 1 + scale),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return v2.Compose([affine, v2.PILToTensor()])


def imagenet_train(
    crop_size: int = 224,
    interpolation: Interpolation = "bilinear",
    hflip_prob: float = 0.5,
    policy: Policy | None = None,
    ra_magnitude: int = 9,
    augmix_severity: int = 3,
    random_erase_prob: float = 0.0,
    min_scale: float = 0.08,
) -> v2.Compose:
    """Random resized crop, flip, an automatic policy and random erasing, as in the official ImageNet preset.

    Erased areas are black. For B-cos models that is the official behavior; for standard models the official preset
    erases after standardization, which leaves the mean color.

    Args:
        policy: ``"ra"`` RandAugment (arXiv 1909.13719), ``"ta_wide"`` TrivialAugment (arXiv 2103.10158), ``"augmix"``
            AugMix (arXiv 1912.02781), or the data set whose AutoAugment policy (arXiv 1805.09501) is used; ``None``:
            none.
        ra_magnitude: Strength of RandAugment's operations, 0 … 30.
        augmix_severity: Strength of AugMix's operations, 1 … 10.
        min_scale: Smallest area of a crop, as a fraction of the image's, in (0, 1].

    Raises:
        ValueError: Unknown policy or interpolation, or ``min_scale`` out of range.
    """
    check_size("crop_size", crop_size)
    mode = _interpolation(interpolation)
    if not 0 < min_scale <= 1:
        raise ValueError(f"min_scale must be greater than 0 and at most 1, not {min_scale}")
    steps: list[v2.Transform] = [v2.RandomResizedCrop(crop_size, scale=(min_scale, 1.0), interpolation=mode)]
    if hflip_prob > 0:
        steps.append(v2.RandomHorizontalFlip(hflip_prob))
    if policy is not None:
        steps.append(_policy(policy, mode, ra_magnitude, augmix_severity))
    steps.append(v2.PILToTensor())
    if random_erase_prob > 0:
        steps.append(v2.RandomErasing(p=random_erase_prob, value=0))
    return v2.Compose(steps)


def imagenet_eval(
    resize_size: int = 256,
    crop_size: int = 224,
    interpolation: Interpolation = "bilinear",
) -> v2.Compose:
    """Resize the shorter side, then crop the center: the official ImageNet preset.

    There is no option for antialiasing: PIL always antialiases.
    """
    check_size("resize_size", resize_size)
    check_size("crop_size", crop_size)
    resize = v2.Resize(resize_size, interpolation=_interpolation(interpolation))
    return v2.Compose([resize, v2.CenterCrop(crop_size), v2.PILToTensor()])


def check_size(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError for a length in pixels that no image of a data set has and that may exhaust the memory."""
    if not least <= value <= MAX_SIZE:
        raise ValueError(f"{name} must lie between {least} and {MAX_SIZE:,} pixels, not {value:,}")


def _interpolation(name: str) -> v2.InterpolationMode:
    _check_name("interpolation", name, get_args(Interpolation))
    return v2.InterpolationMode(name)


def _policy(name: str, mode: v2.InterpolationMode, ra_magnitude: int, augmix_severity: int) -> v2.Transform:
    _check_name("policy", name, get_args(Policy))
    if name == "ra":
        return v2.RandAugment(magnitude=ra_magnitude, interpolation=mode)
    if name == "ta_wide":
        return v2.TrivialAugmentWide(interpolation=mode)
    if name == "augmix":
        return v2.AugMix(severity=augmix_severity, interpolation=mode)
    return v2.AutoAugment(v2.AutoAugmentPolicy(name), interpolation=mode)


def _check_name(argument: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        hint = suggest(name, allowed) or ";"
        raise ValueError(f"unknown {argument} {name!r}{hint} allowed: {join_words(allowed)}")
