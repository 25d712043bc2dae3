"""Score a method on a batch of images or grids.

Axes: N images, G grids, K = n² cells of a grid, C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from bcos_train.evaluation.options import METRICS, ExplanationOptions, GridPointingOptions
from bcos_train.explanation import constant_term, evaluating
from bcos_train.explanation.method import Method
from bcos_train.metric import (
    SlidingWindow,
    area_under_curve,
    completeness_error,
    energy_pointing_scores,
    gini_index,
    grid_pointing_scores,
    iou_scores,
    noise_stability,
    perturbation_curve,
    shift_stability,
)
from bcos_train.metric.perturbation import Order

__all__ = [
    "HIGHER_IS_BETTER",
    "SCORERS",
    "Case",
    "NotMeasured",
    "arrow",
    "explain_grids",
    "register_metric",
    "score_grids",
    "score_images",
]

#: Metrics for which higher values are better; for the others, lower values are.
HIGHER_IS_BETTER: dict[str, bool] = {
    "grid_pointing": True,
    "deletion": False,
    "insertion": True,
    "pixel_perturbation": True,
    "sparsity": True,
    "shift_stability": True,
    "noise_stability": True,
    "completeness": False,
    "alignment": True,
    "energy_pointing": True,
    "iou": True,
}


def arrow(metric: str) -> str:
    """Return "↑" if higher values of the metric are better, otherwise "↓"."""
    return "↑" if HIGHER_IS_BETTER[metric] else "↓"


#: Methods whose maps sum to the logit minus a constant. For the first two, the constant is what the network's biases
#: add to the logit; for the others, it is the logit of an all-zero input.
_LOCAL, _DIFFERENCE = ("bcos", "ixg"), ("int_grad", "deep_lift")


#: Sum of a map's positive values below which its energy pointing score is 0.
MIN_ENERGY = 1e-7


class NotMeasured(ValueError):
    """The metric does not apply to this method; the message says why."""


@dataclass(frozen=True)
class Case:
    """A method on a batch of images.

    Attributes:
        x: (N, C, H, W).
        targets: (N,), the predicted classes; with ``masks`` those of the boxes.
        masks: (N, H, W) bool, True inside the boxes of the target, for metrics that need boxes.
    """

    name: str
    method: Method
    model: nn.Module
    x: Tensor
    targets: Tensor
    options: ExplanationOptions
    masks: Tensor | None = None

    @cached_property
    def maps(self) -> Tensor:
        """Attribution maps (N, H, W), computed once for all metrics."""
        return self.method(self.model, self.x, self.targets[:, None])[:, 0]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the targets: (N,)."""
        with evaluating(self.model):
            return self.model(x).gather(1, self.targets[:, None])[:, 0]

    def area(self, order: Order, insert: bool, baseline: float | Literal["blur"]) -> Tensor:
        """Return the area under the perturbation curve: (N,)."""
        curves = perturbation_curve(
            self.model,
            self.x,
            self.maps,
            self.targets,
            order=order,
            insert=insert,
            baseline=baseline,
            block=self.options.perturbation.block,
            batch_size=max(64, self.options.batch_size),
        )
        return area_under_curve(curves)


def _completeness(case: Case) -> Tensor:
    if case.name in _LOCAL:
        constant = constant_term(case.model, case.x, case.targets)
    elif case.name in _DIFFERENCE:
        constant = case.logits(torch.zeros_like(case.x))
    else:
        raise NotMeasured("its maps are not meant to sum to the logit")
    return completeness_error(case.logits(case.x), case.maps.sum((1, 2)), constant)


def _shift_stability(case: Case) -> Tensor:
    shift = case.options.stability.shift
    return shift_stability(case.method, case.model, case.x, case.targets[:, None], shift=shift)[:, 0]


def _noise_stability(case: Case) -> Tensor:
    settings = case.options.stability
    scores = noise_stability(
        case.method,
        case.model,
        case.x,
        case.targets[:, None],
        std=settings.noise_std,
        n_samples=settings.noise_samples,
    )
    return scores[:, 0]


def _energy_pointing(case: Case) -> Tensor:
    assert case.masks is not None
    scores = energy_pointing_scores(case.maps, case.masks)
    # As in model guidance (arXiv 2303.11932), maps without positive evidence count as 0.
    return torch.where(case.maps.clamp(min=0).sum((1, 2)) < MIN_ENERGY, 0, scores)


def _iou(case: Case) -> Tensor:
    assert case.masks is not None
    return iou_scores(case.maps, case.masks)


#: Metrics of single images; each returns scores (N,).
SCORERS: dict[str, Callable[[Case], Tensor]] = {
    "deletion": lambda case: case.area("most", insert=False, baseline=0.0),
    "insertion": lambda case: case.area("most", insert=True, baseline="blur"),
    "pixel_perturbation": lambda case: case.area("least", insert=False, baseline=0.0),
    "sparsity": lambda case: gini_index(case.maps),
    "shift_stability": _shift_stability,
    "noise_stability": _noise_stability,
    "completeness": _completeness,
    "energy_pointing": _energy_pointing,
    "iou": _iou,
}


def register_metric(name: str, score: Callable[[Case], Tensor], *, higher_is_better: bool) -> None:
    """Add a metric of single images, which ``explanation.metrics`` can then name.

    Args:
        name: Name in configs, tables and files.
        score: :class:`Case` -> (N,) scores; ``case.maps`` holds the attribution maps (N, H, W). It may raise
            :class:`NotMeasured` with the reason.
        higher_is_better: True if higher scores are better.

    Raises:
        ValueError: The name is taken.
    """
    if name in METRICS:
        raise ValueError(f"a metric named {name!r} is registered already")
    SCORERS[name], HIGHER_IS_BETTER[name] = score, higher_is_better
    METRICS.append(name)


def explain_grids(model: nn.Module, method: Method, x: Tensor, targets: Tensor, options: GridPointingOptions) -> Tensor:
    """Compute the maps of the classes of each grid.

    Args:
        x: (G, C, H, W), grids.
        targets: (G, K), classes of the cells.

    Returns:
        (G, K, H, W).
    """
    if options.stride is not None:
        method = SlidingWindow(method, size=x.shape[2] // options.n, stride=options.stride)
    return method(model, x, targets)


def score_grids(model: nn.Module, method: Method, x: Tensor, targets: Tensor, options: GridPointingOptions) -> Tensor:
    """Return grid pointing scores (G, K); arguments as for :func:`explain_grids`."""
    return grid_pointing_scores(explain_grids(model, method, x, targets, options), options.smooth).cpu()


def score_images(metrics: list[str], case: Case) -> dict[str, Tensor | str]:
    """Return scores (N,) for each metric, or the reason why there are none."""
    scores: dict[str, Tensor | str] = {}
    for metric in metrics:
        try:
            scores[metric] = SCORERS[metric](case).detach().cpu()
        except NotMeasured as error:
            scores[metric] = str(error)
    return scores
