"""Distillation from a teacher's predictions and explanations."""

import torch
from torch import Tensor, nn

from bcos_train.distillation import (
    DistillationOptions,
    Teacher,
    choose_explanation,
    distillation_loss,
    explain_by,
    explanation_similarity,
)
from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch

__all__ = ["Distillation"]


class Distillation(Task):
    """Minimize the distance from a teacher's logits (KD) and explanations (e²KD, arXiv 2402.03119).

    The teacher sees the same crop and mix as the student. The explained class is the teacher's prediction, for both.

    Args:
        loss: ``(logits (N, K), target) -> scalar``, the loss without a teacher.
        teacher: Outside the module tree: it is neither trained, saved nor synchronized.
        options: Weights of the losses.
        student: The trained network.

    Raises:
        ValueError: The networks can't be compared by this kind of explanation.
    """

    def __init__(self, loss: nn.Module, teacher: Teacher, options: DistillationOptions, student: nn.Module) -> None:
        super().__init__()
        self.loss, self.teacher, self.options = loss, teacher, options
        self.explanation = choose_explanation(options.explanation, student, teacher.model)

    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        options = self.options
        if options.explanation_weight and batch.step % options.explanation_every_n_steps == 0:
            logits, expected, similarity = self._explain(network, batch)
            explanation_loss = 1 - similarity.mean()
            logs = {"loss_explanation": explanation_loss.detach(), "explanation_similarity": similarity.detach().mean()}
        else:
            logits, expected = network(batch.x), self.teacher.predict(batch.rgb)
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
        expected, theirs = self.teacher.explain(batch.rgb, self.explanation)
        logits, ours = explain_by(self.explanation, network.model, batch.x, expected.argmax(1), create_graph=True)
        return logits, expected, explanation_similarity(ours, theirs)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1.0 for each image of which both networks, with logits (N, K), predict the same class, else 0: (N,)."""
    return (student.argmax(1) == teacher.argmax(1)).to(torch.float32)
