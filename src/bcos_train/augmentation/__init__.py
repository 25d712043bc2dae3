"""Transforms of single images on the CPU, and of whole batches on the device."""

from bcos_train.augmentation.batch_mix import BatchMix
from bcos_train.augmentation.transforms import (
    Augmentation,
    Interpolation,
    Policy,
    crop_flip,
    digits_train,
    imagenet_eval,
    imagenet_train,
    plain,
)

__all__ = [
    "Augmentation",
    "BatchMix",
    "Interpolation",
    "Policy",
    "crop_flip",
    "digits_train",
    "imagenet_eval",
    "imagenet_train",
    "plain",
]
