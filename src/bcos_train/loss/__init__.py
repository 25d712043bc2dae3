"""Losses on logits.

Axes: N images, K classes. Targets are class indices ``(N,)`` int64 or label distributions ``(N, K)`` in [0, 1], as from
MixUp and CutMix; for the binary losses also multi-hot ``(N, K)``. Every loss is the mean over N and K (cross-entropy:
over N).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "UniformOffLabelBinaryCrossEntropy",
    "binary_cross_entropy",
    "uniform_off_label_binary_cross_entropy",
]


def _to_dense(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits in at least float32 and the target as a distribution of the same dtype."""
    if target.shape[0] != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits but {target.shape[0]} targets")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target.shape != logits.shape:
        target = F.one_hot(target, num_classes=logits.shape[1])
    return logits, target.to(logits.dtype)


def binary_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, target_threshold: float | None = None
) -> Tensor:
    """Compute the mean binary cross-entropy over all classes.

    Smoothing follows ``torch.nn.CrossEntropyLoss``: targets become ``(1 - s) t + s / K`` (Szegedy et al.,
    arXiv 1512.00567, sec. 7). A threshold then binarizes them, as in "ResNet strikes back" (arXiv 2110.00476).
    """
    logits, target = _to_dense(logits, target)
    if smoothing > 0:
        target = target * (1 - smoothing) + smoothing / logits.shape[1]
    if target_threshold is not None:
        target = target.gt(target_threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target)


def uniform_off_label_binary_cross_entropy(logits: Tensor, target: Tensor, off_label: float | None = None) -> Tensor:
    """Compute the mean binary cross-entropy with targets of at least ``off_label`` (default: 1/K).

    The loss of the official ImageNet models. The probabilities of the other classes are trained toward 1/K instead of
    0, for which the logits would have to go to minus infinity.
    """
    logits, target = _to_dense(logits, target)
    off_label = 1.0 / logits.shape[1] if off_label is None else off_label
    return F.binary_cross_entropy_with_logits(logits, target.clamp(min=off_label))


class BinaryCrossEntropy(nn.Module):
    """Module version of :func:`binary_cross_entropy`.

    Raises:
        ValueError: ``smoothing`` outside [0, 1) or ``target_threshold`` outside [0, 1).
    """

    #: Map from logits to the probabilities that this loss fits.
    probabilities = staticmethod(torch.sigmoid)

    def __init__(self, smoothing: float = 0.0, target_threshold: float | None = None) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: at least 0 and less than 1")
        if target_threshold is not None and not 0 <= target_threshold < 1:
            raise ValueError(f"target_threshold={target_threshold}: at least 0 and less than 1")
        self.smoothing = smoothing
        self.target_threshold = target_threshold

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(logits, target, self.smoothing, self.target_threshold)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, target_threshold={self.target_threshold}"


class UniformOffLabelBinaryCrossEntropy(nn.Module):
    """Module version of :func:`uniform_off_label_binary_cross_entropy`.

    Raises:
        ValueError: ``off_label`` outside [0, 1].
    """

    probabilities = staticmethod(torch.sigmoid)

    def __init__(self, off_label: float | None = None) -> None:
        super().__init__()
        if off_label is not None and not 0 <= off_label <= 1:
            raise ValueError(f"off_label={off_label}: from 0 to 1, or null for 1/K")
        self.off_label = off_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return uniform_off_label_binary_cross_entropy(logits, target, self.off_label)

    def extra_repr(self) -> str:
        return f"off_label={self.off_label}"


class CrossEntropy(nn.Module):
    """Mean softmax cross-entropy over the images; ``smoothing`` as in :func:`binary_cross_entropy`.

    Raises:
        ValueError: ``smoothing`` outside [0, 1).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: at least 0 and less than 1")
        self.smoothing = smoothing

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Map logits to the probabilities that this loss fits."""
        return logits.softmax(-1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"
