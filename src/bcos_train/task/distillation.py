"""Distillation from a teacher's predictions and explanations."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from bcos_train.distillation import (
    DistillationOptions,
    FrozenTeacher,
    Teacher,
    check_stored_explanation,
    choose_explanation,
    crop_maps,
    distillation_loss,
    explain_by,
    explanation_similarity,
)
from bcos_train.distillation.options import ExplanationKind
from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch

__all__ = ["Distillation", "DistillationTask", "FrozenDistillation"]


class DistillationTask(Task):
    """Minimize the distance from a teacher's logits (KD) and explanations (e²KD, arXiv 2402.03119).

    The explained class is the teacher's prediction, for both.

    Args:
        loss: ``(logits (N, K), target) -> scalar``, the loss without a teacher.
        options: Weights of the losses.
        explanation: What is compared.

    Attributes:
        teacher: Outside the module tree: it is neither trained, saved nor synchronized.
    """

    teacher: Teacher | FrozenTeacher

    def __init__(self, loss: nn.Module, options: DistillationOptions, explanation: ExplanationKind) -> None:
        super().__init__()
        self.loss, self.options, self.explanation = loss, options, explanation

    @abstractmethod
    def expect(self, batch: TrainingBatch) -> Tensor:
        """Return the teacher's logits (N, K) of a training batch."""

    @abstractmethod
    def expect_explanations(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits (N, K) of a training batch, and explanations (N, *)."""

    @abstractmethod
    def expect_in_validation(self, rgb: Tensor, indices: Tensor) -> Tensor:
        """Return the teacher's logits (N, K) of validation images: RGB in [0, 1] (N, 3, H, W), and their indices."""

    @abstractmethod
    def expect_explanations_in_validation(self, rgb: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits (N, K) of validation images, and explanations (N, *)."""

    def known_accuracy(self) -> float | None:
        """Return the teacher's top-1 accuracy in percent on the validation images; None if they have to be shown."""
        return None

    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        options = self.options
        if options.explanation_weight and batch.step % options.explanation_every_n_steps == 0:
            logits, expected, similarity = self._explain(network, batch)
            explanation_loss = 1 - similarity.mean()
            logs = {"loss_explanation": explanation_loss.detach(), "explanation_similarity": similarity.detach().mean()}
        else:
            logits, expected = network(batch.x), self.expect(batch)
            explanation_loss, logs = logits.new_zeros(()), {}
        ground_truth_loss = self.loss(logits, batch.target)
        kd_loss = distillation_loss(logits, expected, options.temperature)
        # A loss with weight 0 has no part in the graph: its backward pass would cost time, and NaN times 0 is NaN.
        weighted = (
            (options.ground_truth_weight, ground_truth_loss),
            (options.kd_weight, kd_loss),
            (options.explanation_weight, explanation_loss),
        )
        loss = torch.stack([weight * value for weight, value in weighted if weight]).sum()
        logs |= {
            "loss_ground_truth": ground_truth_loss.detach(),
            "loss_kd": kd_loss.detach(),
            "agreement": 100 * agreement(logits, expected).mean(),
        }
        return TaskOutput(loss, logits, logs)

    def _explain(self, network: Network, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's logits, the teacher's, and the similarity of their explanations (N,)."""
        expected, theirs = self.expect_explanations(batch)
        logits, ours = explain_by(self.explanation, network.model, batch.x, expected.argmax(1), create_graph=True)
        return logits, expected, explanation_similarity(ours, theirs)


class Distillation(DistillationTask):
    """Distillation from a teacher that sees the same crop and mix as the student.

    Args:
        loss: ``(logits (N, K), target) -> scalar``, the loss without a teacher.
        teacher: Outside the module tree: it is neither trained, saved nor synchronized.
        options: Weights of the losses.
        student: The trained network.

    Raises:
        ValueError: The networks can't be compared by this kind of explanation.
    """

    def __init__(self, loss: nn.Module, teacher: Teacher, options: DistillationOptions, student: nn.Module) -> None:
        super().__init__(loss, options, choose_explanation(options.explanation, student, teacher.model))
        self.teacher: Teacher = teacher

    def expect(self, batch: TrainingBatch) -> Tensor:
        return self.teacher.predict(batch.rgb)

    def expect_explanations(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        return self.teacher.explain(batch.rgb, self.explanation)

    def expect_in_validation(self, rgb: Tensor, indices: Tensor) -> Tensor:
        return self.teacher.predict(rgb)

    def expect_explanations_in_validation(self, rgb: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher.explain(rgb, self.explanation)


class FrozenDistillation(DistillationTask):
    """Distillation from stored logits and maps of the whole images.

    The student is compared with the part of the map that its crop shows, and with the logits of the whole image.

    Args:
        loss: ``(logits (N, K), target) -> scalar``, the loss without a teacher.
        teacher: Stored logits and maps. Batches have those of its lookup as extras.
        options: Weights of the losses.
        student: The trained network.

    Raises:
        ValueError: The student can't be compared by the stored kind of explanation.
    """

    def __init__(
        self, loss: nn.Module, teacher: FrozenTeacher, options: DistillationOptions, student: nn.Module
    ) -> None:
        super().__init__(loss, options, teacher.explanation)
        if options.explanation not in (None, teacher.explanation):
            raise ValueError(f"explanation={options.explanation}: the stored maps are {teacher.explanation}")
        check_stored_explanation(teacher.explanation, teacher.store.manifest.parts["train"].map_shape[0], student)
        self.teacher: FrozenTeacher = teacher

    def known_accuracy(self) -> float:
        return self.teacher.accuracy

    def expect(self, batch: TrainingBatch) -> Tensor:
        return _extra(batch, "teacher_logits")

    def expect_explanations(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        maps, windows = _extra(batch, "teacher_maps"), _extra(batch, "window")
        return self.expect(batch), self._unstacked(crop_maps(maps, windows, *batch.rgb.shape[2:]))

    def expect_in_validation(self, rgb: Tensor, indices: Tensor) -> Tensor:
        return self.teacher.val_logits(indices)

    def expect_explanations_in_validation(self, rgb: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher.val_logits(indices), self._unstacked(self.teacher.val_maps(indices, *rgb.shape[2:]))

    def _unstacked(self, maps: Tensor) -> Tensor:
        """Return W(x) (N, C, H, W), or maps (N, H, W) in place of (N, 1, H, W)."""
        return maps if self.explanation == "weights" else maps[:, 0]


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1.0 for each image of which both networks, with logits (N, K), predict the same class, else 0: (N,)."""
    return (student.argmax(1) == teacher.argmax(1)).to(torch.float32)


def _extra(batch: TrainingBatch, name: str) -> Tensor:
    assert batch.extras is not None, "the data module has no lookup"
    value = batch.extras[name]
    assert isinstance(value, Tensor)
    return value
