"""MixUp and CutMix on whole batches, on the device."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.transforms import v2

__all__ = ["BatchMix"]


class BatchMix(nn.Module):
    """Mix every sample with its neighbor in the batch: MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    If both are enabled, each batch uses one of them, with equal probability, as in the official code. All random
    numbers are drawn from torch's CPU generator.

    Args:
        num_classes: Number of classes K.
        mixup_alpha: Both parameters of the Beta distribution of MixUp's weight; 0 disables MixUp.
        cutmix_alpha: The same for the fraction of the area that CutMix keeps; 0 disables CutMix.

    Raises:
        ValueError: An alpha is negative or ``num_classes`` is below 1.
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

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch; return it unchanged if both alphas are 0.

        Shapes:
            - images: ``(N, C, H, W)``, float
            - labels: ``(N,)``, int64
            - Output: images ``(N, C, H, W)`` and labels ``(N, K)``, float, that sum to 1
        """
        if self.mix is None:
            return images, labels
        if not images.is_floating_point():
            raise ValueError(f"images must be float to be mixed, not {images.dtype}")
        mixed_images, mixed_labels = self.mix(images, labels)
        return mixed_images, mixed_labels

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, mixup_alpha={self.mixup_alpha}, cutmix_alpha={self.cutmix_alpha}"
