"""Model guidance: localization losses that move explanations onto annotated objects."""

from bcos_train.guidance.boxes import class_masks, positive_classes
from bcos_train.guidance.localization import (
    LOCALIZATION_LOSSES,
    energy_loss,
    l1_loss,
    ppce_loss,
    resize_maps,
    rrr_loss,
)
from bcos_train.guidance.options import GuidanceOptions, LocalizationLoss

__all__ = [
    "LOCALIZATION_LOSSES",
    "GuidanceOptions",
    "LocalizationLoss",
    "class_masks",
    "energy_loss",
    "l1_loss",
    "positive_classes",
    "ppce_loss",
    "resize_maps",
    "rrr_loss",
]
