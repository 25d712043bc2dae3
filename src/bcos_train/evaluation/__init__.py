"""Methods times metrics: measuring the explanations of a model, while it trains and afterwards."""

from bcos_train.evaluation.measuring import Results, measure
from bcos_train.evaluation.options import (
    METRICS,
    ExplanationOptions,
    GridPointingOptions,
    PerturbationOptions,
    StabilityOptions,
)
from bcos_train.evaluation.scoring import Case, NotMeasured, register_metric
from bcos_train.evaluation.store import ScoreStore
from bcos_train.evaluation.subject import Predictions, Subject
from bcos_train.evaluation.summary import describe, summarize

__all__ = [
    "METRICS",
    "Case",
    "ExplanationOptions",
    "GridPointingOptions",
    "NotMeasured",
    "PerturbationOptions",
    "Predictions",
    "Results",
    "ScoreStore",
    "StabilityOptions",
    "Subject",
    "describe",
    "measure",
    "register_metric",
    "summarize",
]
