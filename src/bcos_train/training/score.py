"""Loss and scores over all samples and processes.

Sums and counts are stored instead of means of batches, so that batches of different sizes are weighted correctly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

__all__ = ["SUM_DTYPE", "ClassificationScore", "MultiLabelScore", "score_names"]

#: Dtype of sums over batches. Apple's GPUs have no float64; in float32, the sum of a thousand losses has a relative
#: error of about 1e-6.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


def score_names(is_multi_label: bool, group_names: Sequence[str] | None, validation: bool) -> list[str]:
    """Return the names of the scores that are computed in training or in validation, besides ``count``."""
    if is_multi_label:
        return ["f1", *(["map"] if validation else []), "loss"]
    return ["acc1", "acc5", "loss", *(_group_keys(group_names) if validation and group_names is not None else [])]


def _group_keys(names: Sequence[str]) -> list[str]:
    return ["worst_group_acc1", *(f"group_acc1/{name.replace(' ', '_')}" for name in names)]


class ClassificationScore(Metric):
    """Mean loss, top-1 and top-5 accuracy; with groups, also the top-1 accuracy on each and on the worst of them.

    The state without groups is persistent: saved within an epoch, the score resumes there. With fewer than five
    classes, the top-5 accuracy is 100%.

    Args:
        group_names: Names of the groups; ``None``: no groups.
    """

    full_state_update = False
    loss_sum: Tensor
    correct1: Tensor
    correct5: Tensor
    count: Tensor
    group_correct: Tensor
    group_count: Tensor

    def __init__(self, group_names: Sequence[str] | None = None) -> None:
        super().__init__()
        for name in ("loss_sum", "correct1", "correct5", "count"):
            zero = torch.zeros((), dtype=SUM_DTYPE if name == "loss_sum" else torch.int64)
            self.add_state(name, zero, dist_reduce_fx="sum", persistent=True)
        self.group_names = group_names
        if group_names is not None:
            for name in ("group_correct", "group_count"):
                self.add_state(name, torch.zeros(len(group_names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logits: Tensor, target: Tensor, groups: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            loss: Scalar, the mean over the batch.
            logits: ``(N, K)``.
            target: Class indices ``(N,)``, or label distributions ``(N, K)``, of which the largest entry is the label.
            groups: ``(N,)``, int64; only used if the score has groups.
        """
        if target.ndim == 2:
            target = target.argmax(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        self.loss_sum += loss.detach().to(SUM_DTYPE) * len(target)
        self.correct1 += top[:, 0].sum()
        self.correct5 += top.sum()
        self.count += len(target)
        if self.group_names is not None and groups is not None:
            self.group_count.index_add_(0, groups, torch.ones_like(groups))
            self.group_correct.index_add_(0, groups, top[:, 0].to(torch.int64))

    def compute(self) -> dict[str, float]:
        """Return ``loss``, ``acc1`` and ``acc5`` in percent, and ``count``.

        With groups, also ``worst_group_acc1`` and ``group_acc1/<name>`` in percent, of groups with samples.
        """
        n = max(int(self.count), 1)
        result = {
            "loss": float(self.loss_sum) / n,
            "acc1": 100 * int(self.correct1) / n,
            "acc5": 100 * int(self.correct5) / n,
            "count": int(self.count),
        }
        if self.group_names is not None:
            worst, *keys = _group_keys(self.group_names)
            counts = zip(keys, self.group_correct.tolist(), self.group_count.tolist(), strict=True)
            groups = {key: 100 * correct / count for key, correct, count in counts if count}
            result |= {worst: min(groups.values(), default=math.nan), **groups}
        return result


class MultiLabelScore(Metric):
    """Mean loss and micro-F1 for multi-hot labels, and optionally the mean average precision.

    A class is predicted if its logit is at least 0. Loss and F1 are persistent: saved within an epoch, they resume
    there.

    Args:
        average_precision: Also compute the mean over the classes of the average precision, for which all logits are
            kept. Classes without a positive sample are left out.
    """

    full_state_update = False
    loss_sum: Tensor
    true_positives: Tensor
    predicted: Tensor
    positives: Tensor
    count: Tensor
    logits: list[Tensor]
    targets: list[Tensor]

    def __init__(self, average_precision: bool = False) -> None:
        super().__init__()
        for name in ("loss_sum", "true_positives", "predicted", "positives", "count"):
            zero = torch.zeros((), dtype=SUM_DTYPE if name == "loss_sum" else torch.int64)
            self.add_state(name, zero, dist_reduce_fx="sum", persistent=True)
        self.average_precision = average_precision
        if average_precision:
            for name in ("logits", "targets"):
                self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, loss: Tensor, logits: Tensor, target: Tensor, groups: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            loss: Scalar, the mean over the batch.
            logits: ``(N, K)``.
            target: Multi-hot ``(N, K)``.
            groups: Unused.
        """
        logits, labels = logits.detach(), target > 0
        predicted = logits >= 0
        self.loss_sum += loss.detach().to(SUM_DTYPE) * len(target)
        self.true_positives += (predicted & labels).sum()
        self.predicted += predicted.sum()
        self.positives += labels.sum()
        self.count += len(target)
        if self.average_precision:
            self.logits.append(logits.float())
            self.targets.append(labels.to(torch.uint8))

    def compute(self) -> dict[str, float]:
        """Return ``loss``, ``f1`` and, if asked for, ``map`` in percent, and ``count``.

        F1 is 2 TP / (2 TP + FP + FN) over all samples and classes, 0 without any prediction or label. ``map`` is NaN
        if no class has a positive sample.
        """
        n = max(int(self.count), 1)
        result = {
            "loss": float(self.loss_sum) / n,
            "f1": 100 * 2 * int(self.true_positives) / max(int(self.predicted) + int(self.positives), 1),
            "count": int(self.count),
        }
        if self.average_precision:
            result["map"] = 100 * self._mean_average_precision()
        return result

    def _mean_average_precision(self) -> float:
        if not len(self.logits):
            return math.nan
        logits, targets = dim_zero_cat(self.logits), dim_zero_cat(self.targets)
        has_positives = targets.sum(0) > 0
        n_classes = int(has_positives.sum())
        if not n_classes:
            return math.nan
        # Only the order of a class's scores matters. In float32, sigmoids of large logits would be equal.
        scores, targets = logits[:, has_positives].to(SUM_DTYPE).sigmoid(), targets[:, has_positives].long()
        if n_classes == 1:  # not a multi-label problem to torchmetrics
            scores, targets = scores.expand(-1, 2), targets.expand(-1, 2)
        value = multilabel_average_precision(scores, targets, num_labels=scores.shape[1], average="macro")
        assert isinstance(value, Tensor)
        return float(value)
