"""Plugin for an ablation: e2KD with the dynamic scales as constants, as a loss on explanations sees them in
``explanation_mode()``. W(x) and the losses are the same, but the gradient of the loss on W(x) is not."""

from unittest.mock import patch

import torch
from torch import Tensor, nn

from bcos_train.distillation.explanation import explain_by
from bcos_train.distillation.options import ExplanationKind
from bcos_train.explanation import explanation_mode
from bcos_train.task import distillation


def explain_by_constants(
    kind: ExplanationKind, model: nn.Module, x: Tensor, target: Tensor, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`bcos_train.distillation.explanation.explain_by` for ``kind="weights"``, with the wrong gradient."""
    assert kind == "weights"
    if not create_graph:
        return explain_by(kind, model, x, target)
    logits = model(x)
    statistics = [buffer.clone() for buffer in model.buffers()]
    with explanation_mode(model):
        x = x.detach().requires_grad_()
        explained = model(x).gather(1, target[:, None]).sum()
        (weights,) = torch.autograd.grad(explained, x, create_graph=True)
    for buffer, before in zip(model.buffers(), statistics, strict=True):  # updated once per step
        buffer.data.copy_(before)
    return logits, weights


# The teacher is explained by its own method; the validation compares correct explanations.
patch.object(distillation, "explain_by", explain_by_constants).start()
