"""Loss and accuracy over an epoch."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassificationScore(Metric):
    """Mean loss, top-1 and top-5 accuracy over all samples seen, on any number of processes.

    Sums and counts are kept, not means of batches, so batches of different sizes weigh as they should. The state is
    persistent: saved in the middle of an epoch, it goes on from there. With fewer than five classes, top-5 counts all.
    """

    full_state_update = False
    loss_sum: Tensor
    correct1: Tensor
    correct5: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in {"loss_sum": torch.float64, "correct1": torch.int64, "correct5": torch.int64,
                            "count": torch.int64}.items():  # fmt: skip
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum", persistent=True)

    def update(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            loss: Scalar, the mean over the batch.
            logits: ``(N, K)``.
            target: Class indices ``(N,)``, or distributions ``(N, K)`` of which the largest entry counts.
        """
        if target.ndim == 2:
            target = target.argmax(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        self.loss_sum += loss.detach().double() * len(target)
        self.correct1 += top[:, 0].sum()
        self.correct5 += top.sum()
        self.count += len(target)

    def compute(self) -> dict[str, float]:
        """``loss``, ``acc1`` and ``acc5`` (percent), and ``count``."""
        n = max(int(self.count), 1)
        return {
            "loss": float(self.loss_sum) / n,
            "acc1": 100 * int(self.correct1) / n,
            "acc5": 100 * int(self.correct5) / n,
            "count": int(self.count),
        }
