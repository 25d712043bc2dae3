"""Agreement of a student with its teacher on the validation images."""

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torchmetrics import MeanMetric

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.encoding import to_float
from bcos_train.distillation import DistillationOptions, distillation_loss, explain_by, explanation_similarity
from bcos_train.loading import pad_class_names
from bcos_train.report import Explained, pair_gallery
from bcos_train.runs.checkpoint import Checkpoint
from bcos_train.task.distillation import Distillation, DistillationTask, agreement
from bcos_train.training.module import Classifier
from bcos_train.training.score import SUM_DTYPE

__all__ = ["DistillationCallback", "distillation_metrics", "draw_pair_gallery"]

AGREEMENT, KL, TEACHER, SIMILARITY = "val/agreement", "val/kl", "val/teacher_acc1", "val/explanation_similarity"
#: About the number of validation images whose explanations are compared, evenly spaced: each needs four passes.
N_EXPLAINED = 500


def distillation_metrics(options: DistillationOptions) -> list[str]:
    """Return the names of the metrics that are logged in a validation."""
    return [AGREEMENT, KL, TEACHER, *([SIMILARITY] if options.explanation_weight else [])]


def draw_pair_gallery(
    task: DistillationTask,
    module: Classifier,
    samples: tuple[Tensor, Tensor],
    *,
    title: str,
    epoch: int | None = None,
    accuracy: float | None = None,
) -> Figure:
    """Draw the explanations that the task compares; see :func:`~bcos_train.report.pair_gallery`.

    Args:
        samples: Those of ``module.data.fixed_val_samples``: uint8 images ``(N, 3, H, W)`` and labels ``(N,)``.
    """
    images, labels = (tensor.to(module.device) for tensor in samples)
    rgb = to_float(images)
    indices = torch.tensor(module.data.fixed_val_indices(len(rgb)), device=module.device)
    expected, theirs = task.expect_explanations_in_validation(rgb, indices)
    predicted = expected.argmax(1)
    logits, ours = explain_by(task.explanation, module.model, module.encode_floats(rgb), predicted)
    similarity = explanation_similarity(ours, theirs)
    if theirs.ndim == 4 and theirs.shape[1] != 6:  # colors need the encoding [r, g, b, 1-r, 1-g, 1-b]
        encode = task.teacher.encode if isinstance(task, Distillation) else module.encode_floats
        ours, theirs = (module.encode_floats(rgb) * ours).sum(1), (encode(rgb) * theirs).sum(1)
    names = pad_class_names(module.data.class_names, logits.shape[1])
    student, teacher = Explained(logits.argmax(1), ours), Explained(predicted, theirs)
    return pair_gallery(rgb, teacher, student, labels, names, similarity, title=title, epoch=epoch, accuracy=accuracy)


class DistillationCallback(pl.Callback):
    """Logs in each validation how often the predictions agree, the divergence, and the similarity of explanations.

    ``val/agreement`` and ``val/teacher_acc1`` are percentages of images, ``val/kl`` the mean divergence of the
    student's softmax from the teacher's, without temperature, and ``val/explanation_similarity`` the mean cosine of
    the explanations of the teacher's predictions, of about 500 images.
    """

    def __init__(self, task: DistillationTask, console: Console) -> None:
        self.task, self.console = task, console
        self.means = {name: MeanMetric().set_dtype(SUM_DTYPE) for name in distillation_metrics(task.options)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for mean in self.means.values():
            mean.to(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        data = pl_module.data
        accuracy = self.task.known_accuracy()
        if accuracy is None:  # one that is recorded with the weights may be that of other validation images
            mean = MeanMetric().to(pl_module.device)
            for batch in data.val_dataloader():
                images, labels, indices = (part.to(pl_module.device) for part in batch[:3])
                mean.update(self.task.expect_in_validation(to_float(images), indices).argmax(1) == labels)
            accuracy = 100 * float(mean.compute())
        if trainer.is_global_zero:
            self.console.print(f"   teacher  {accuracy:.2f}% of the validation images", soft_wrap=True)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for mean in self.means.values():
            mean.reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Classifier)
        assert isinstance(outputs, dict)
        logits, rgb = outputs["logits"], to_float(batch.images)
        expected = self.task.expect_in_validation(rgb, batch.indices)
        self.means[AGREEMENT].update(100 * agreement(logits, expected))
        self.means[KL].update(distillation_loss(logits, expected), len(logits))
        self.means[TEACHER].update(100 * (expected.argmax(1) == batch.labels))
        if SIMILARITY in self.means:
            is_explained = batch.indices % max(1, pl_module.data.num_val // N_EXPLAINED) == 0
            if len(rgb := rgb[is_explained]):
                self.means[SIMILARITY].update(self._similarity(pl_module, rgb, batch.indices[is_explained]))

    def _similarity(self, module: Classifier, rgb: Tensor, indices: Tensor) -> Tensor:
        kind = self.task.explanation
        expected, theirs = self.task.expect_explanations_in_validation(rgb, indices)
        _, ours = explain_by(kind, module.model, module.encode_floats(rgb), expected.argmax(1))
        return explanation_similarity(ours, theirs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        with torch.no_grad():
            pl_module.log_now({name: float(mean.compute()) for name, mean in self.means.items()})

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        checkpoint["teacher"] = self.task.teacher.record
