"""MixUp and CutMix on whole batches, on the device."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.transforms import v2

__all__ = ["BatchMix"]


class BatchMix(nn.Module):
    """Mix every sample with its neighbour in the batch: MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    With both on, each batch takes one of the two with equal chance, as in the official code.

    All chance comes from torch's CPU generator.

    Args:
        num_classes: K.
        mixup_alpha: both parameters of the Beta distribution of MixUp's weight; 0 turns MixUp off.
        cutmix_alpha: the same for the share of the area that CutMix keeps; 0 turns CutMix off.

    Raises:
        ValueError: for a negative alpha or no class.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if alpha < 0:
                raise ValueError(f"{name} must be 0 (off) or more, not {alpha}")
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        transforms: list[v2.Transform] = []
        if mixup_alpha > 0:
            transforms.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha > 0:
            transforms.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        self.mix = v2.RandomChoice(transforms) if len(transforms) > 1 else transforms[0] if transforms else None

    @property
    def active(self) -> bool:
        return self.mix is not None

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (N,C,H,W), labels int64 (N,) -> images (N,C,H,W), labels float (N,K) that sum to 1.

        With both alphas 0 images and labels come back as they are.
        """
        if self.mix is None:
            return images, labels
        if not images.is_floating_point():
            raise ValueError(f"images must be float to be mixed, not {images.dtype}")
        mixed_images, mixed_labels = self.mix(images, labels)
        return mixed_images, mixed_labels

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, mixup_alpha={self.mixup_alpha}, cutmix_alpha={self.cutmix_alpha}"
