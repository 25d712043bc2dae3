"""Losses of distillation (Parchami-Araghi et al., "Good Teachers Explain", ECCV 2024, arXiv 2402.03119).

Axes: N images, K classes; ``*`` the axes of an explanation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation_loss", "explanation_similarity"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), mean over images (Hinton et al., 2015, arXiv 1503.02531).

    The softmax is taken for models trained with binary cross-entropy, too, as in arXiv 2402.03119, eq. 1.

    Args:
        student, teacher: Logits (N, K).
        temperature: τ > 0.

    Returns:
        Scalar, in float32 or float64.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_s = F.log_softmax(student.to(dtype) / temperature, dim=1)
    log_t = F.log_softmax(teacher.to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def explanation_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of two explanations of each image, flattened (arXiv 2402.03119, eq. 4); 0 where one of them is 0.

    Args:
        student, teacher: (N, *), of equal shape.

    Returns:
        (N,) in [-1, 1], in float32 or float64.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    return F.cosine_similarity(student.flatten(1).to(dtype), teacher.flatten(1).to(dtype), dim=1)
