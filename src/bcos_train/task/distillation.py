"""Distillation from a teacher's predictions and explanations."""

import torch
from torch import Tensor, nn

from bcos_train.distillation import DistillationOptions, Teacher, distillation_loss, explanation_similarity
from bcos_train.explanation import dynamic_linear_weights, is_explainable
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
        ValueError: ``explanation=weights``, and one of the networks is no B-cos network or their encodings differ.
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
        expected, teacher_weights, teacher_x = self.teacher.explain(batch.rgb)
        logits, weights = dynamic_linear_weights(network.model, batch.x, expected.argmax(1), create_graph=True)
        explanations = (self.to_explanation(x, w) for x, w in ((batch.x, weights), (teacher_x, teacher_weights)))
        return logits, expected, explanation_similarity(*explanations)

    def to_explanation(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return what is compared: W(x) itself, (N, C, H, W), or contributions (N, H, W)."""
        return weights if self.explanation == "weights" else (x * weights).sum(1)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1.0 for each image of which both networks, with logits (N, K), predict the same class, else 0: (N,)."""
    return (student.argmax(1) == teacher.argmax(1)).to(torch.float32)


def choose_explanation(kind: str | None, student: nn.Module, teacher: nn.Module) -> str:
    """Return the kind of explanations that two networks are compared by.

    Raises:
        ValueError: W(x) of networks that aren't both B-cos networks with the same encoding.
    """
    are_bcos = [is_explainable(network) for network in (student, teacher)]
    channels = {getattr(network, "in_chans", None) for network in (student, teacher)}
    has_weights = all(are_bcos) and len(channels) == 1
    if kind == "weights" and not has_weights:
        raise ValueError(
            "explanation=weights compares W(x) of two B-cos networks with the same encoding; use contributions"
        )
    return kind or ("weights" if has_weights else "contributions")
