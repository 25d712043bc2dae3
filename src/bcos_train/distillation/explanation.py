"""Explanations that a student and its teacher are compared by.

Axes: N images, C channels of the model's input, H, W pixels, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.distillation.options import ExplanationKind
from bcos_train.explanation import attribution_maps, dynamic_linear_weights, is_explainable
from bcos_train.explanation.trainable import find_layer

__all__ = ["check_stored_explanation", "choose_explanation", "choose_stored_explanation", "explain_by"]

#: Layer that Grad-CAM explains.
_STAGE = "final"


def explain_by(
    kind: ExplanationKind, model: nn.Module, x: Tensor, target: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Explain one class per image.

    Args:
        model: (N, C, H, W) -> logits (N, K).
        x: (N, C, H, W).
        target: (N,) classes; ``None``: the predicted ones.
        create_graph: Return results that are differentiable with respect to the parameters.

    Returns:
        The logits (N, K), and W(x) (N, C, H, W) or a map (N, H, W).
    """
    if kind == "grad_cam":
        logits, maps = attribution_maps(model, x, target, "grad_cam", _STAGE)
        if not create_graph:
            logits, maps = logits.detach(), maps.detach()
        return logits, F.interpolate(maps[:, None], x.shape[2:], mode="bilinear")[:, 0]
    logits, weights = dynamic_linear_weights(model, x, target, create_graph)
    return logits, weights if kind == "weights" else (x * weights).sum(1)


def choose_explanation(kind: ExplanationKind | None, student: nn.Module, teacher: nn.Module) -> ExplanationKind:
    """Return the kind of explanations that two networks are compared by.

    Args:
        kind: ``None``: W(x) for two B-cos networks with the same encoding, Grad-CAM for two standard networks with
            stages, else contributions.

    Raises:
        ValueError: W(x) of other networks than two B-cos networks with the same encoding, or Grad-CAM of a network
            without stages.
    """
    networks = (student, teacher)
    are_bcos = [is_explainable(network) for network in networks]
    has_weights = all(are_bcos) and len({getattr(network, "in_chans", None) for network in networks}) == 1
    if kind == "weights" and not has_weights:
        raise ValueError(
            "explanation=weights compares W(x) of two B-cos networks with the same encoding; use contributions"
        )
    if kind == "grad_cam":
        for network in networks:
            find_layer(network, _STAGE)
    if kind is not None:
        return kind
    if has_weights:
        return "weights"
    return "grad_cam" if not any(are_bcos) and all(map(_has_stages, networks)) else "contributions"


def choose_stored_explanation(kind: ExplanationKind | None, teacher: nn.Module) -> ExplanationKind:
    """Return the kind of explanations to store of a teacher, for students that are B-cos networks.

    All kinds are maps, of which a crop can be taken.

    Args:
        kind: ``None``: W(x) of a B-cos network, contributions of others.

    Raises:
        ValueError: The teacher can't be explained in this way.
    """
    if kind is None:
        return "weights" if is_explainable(teacher) else "contributions"
    return choose_explanation(kind, teacher, teacher)


def check_stored_explanation(kind: ExplanationKind, channels: int, student: nn.Module) -> None:
    """Raise a ValueError if a student can't be compared by stored explanations.

    Args:
        channels: Number of channels of the stored maps.
    """
    if kind == "weights" and not (is_explainable(student) and getattr(student, "in_chans", channels) == channels):
        raise ValueError(
            f"the stored maps are W(x) with {channels} channels, of a B-cos network; for this student compute maps "
            "with distillation.explanation=contributions"
        )
    if kind == "grad_cam":
        find_layer(student, _STAGE)


def _has_stages(network: nn.Module) -> bool:
    try:
        find_layer(network, _STAGE)
    except ValueError:
        return False
    return True
