"""The config group ``guidance``."""

from dataclasses import dataclass
from typing import Literal, get_args

from bcos_train.explanation import Attribution

__all__ = ["GuidanceOptions", "LocalizationLoss"]

#: Keys of :data:`bcos_train.guidance.LOCALIZATION_LOSSES`, spelled out so that a config can be checked by its types.
LocalizationLoss = Literal["energy", "l1", "ppce", "rrr"]


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Loss: the training's own one, plus ``weight`` times the sum of a localization loss over the images of a batch.

    Args:
        loss: Localization loss, see :mod:`bcos_train.guidance.localization`.
        weight: λ, as in the paper the weight of a sum over the batch: with 64 images, 0.001 is 0.064 times the mean.
        method: Attribution that is guided: ``"bcos"``, ``"ixg"`` or ``"grad_cam"``, see
            :data:`bcos_train.explanation.Attribution`.
        layer: Where the attribution is computed: ``"input"``; ``"mid1"``, ``"mid2"``, ``"mid3"`` or ``"final"``, the
            outputs of a ResNet's stages; or the path of another module that returns feature maps.
        start_epoch: Number of epochs without guidance at the beginning.
        annotated_fraction: Share of the training images whose boxes are used; the others count as images without.
        annotated_seed: Seeds the choice of these images. A larger fraction contains those of a smaller one.
        box_dilation: Each side of a box moves outwards by this fraction of the box's width or height.

    Raises:
        ValueError: A value is out of range.
    """

    loss: LocalizationLoss
    weight: float = 1e-3
    method: Attribution = "bcos"
    layer: str = "input"
    start_epoch: int = 0
    annotated_fraction: float = 1.0
    annotated_seed: int = 0
    box_dilation: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("loss", get_args(LocalizationLoss)), ("method", get_args(Attribution))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value}: one of {', '.join(allowed)}")
        for name in ("weight", "start_epoch", "annotated_seed", "box_dilation"):
            if not 0 <= (number := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name}={number}: at least 0")
        if not 0 < self.annotated_fraction <= 1:
            raise ValueError(f"annotated_fraction={self.annotated_fraction}: more than 0, up to 1")
