"""All that is done to images between the data set and the model's encoding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """The transforms of a run.

    Args:
        train: PIL image -> uint8 ``(3, H, W)``, random.
        eval: PIL image -> uint8 ``(3, H, W)``, without chance.
        mixup_alpha, cutmix_alpha: Parameters of MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899), applied to
            whole batches; 0: off. With both on, each batch gets one of them, with equal probability.
        repetitions: Augmented versions of a sample in an epoch (repeated augmentation, arXiv 1901.09335).
    """

    train: Transform
    eval: Transform
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    repetitions: int = 1
