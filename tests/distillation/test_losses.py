"""Losses of distillation against values computed by hand."""

import math

import pytest
import torch

from bcos_train.distillation import distillation_loss, explanation_similarity


def test_divergence_by_hand() -> None:
    """Teacher first; temperature on both; times its square; mean over images and sum over classes."""
    student = torch.tensor([[0.0, 0.0], [math.log(9), 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3), 0.0], [math.log(9), 0.0]], dtype=torch.float64)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(distillation_loss(student, teacher)) == pytest.approx(expected / 2, rel=1e-12)
    # softmax(logits / 2): 3^(1/2) : 1 for the teacher's first image.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    softened = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(4 * softened / 2, rel=1e-12)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(distillation_loss(teacher, student)) == pytest.approx(reverse / 2, rel=1e-12)


def test_similarity_is_the_cosine_of_each_image() -> None:
    a = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    b = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[-5.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]]])
    torch.testing.assert_close(explanation_similarity(a, b), torch.tensor([0.8, -1.0, 0.0]))
    torch.testing.assert_close(explanation_similarity(7 * a, b), explanation_similarity(a, b))


def test_gradients_are_finite_and_reach_the_student_alone() -> None:
    student, teacher = torch.zeros(2, 6, 3, 3, requires_grad=True), torch.ones(2, 6, 3, 3)
    (1 - explanation_similarity(student, teacher).mean()).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[30.0, -30.0, 0.5]])
    loss = distillation_loss(logits.to(dtype), logits.flip(1).to(dtype))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(logits.to(dtype).float(), logits.flip(1).to(dtype).float()))
    maps = 300 * torch.ones(1, 6, 64, 64, dtype=dtype)  # the norm exceeds the range of float16
    torch.testing.assert_close(explanation_similarity(maps, maps), torch.ones(1))
