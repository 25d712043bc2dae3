"""Measure explanations, methods × metrics, during training and afterwards."""

from bcos_train.evaluation.measuring import Results, measure
from bcos_train.evaluation.options import (
    BOX_METRICS,
    METRICS,
    ExplanationOptions,
    GridPointingOptions,
    PerturbationOptions,
    StabilityOptions,
)
from bcos_train.evaluation.scoring import Case, NotMeasured, register_metric
from bcos_train.evaluation.store import ScoreStore
from bcos_train.evaluation.subject import Predictions, Subject
from bcos_train.evaluation.summary import summarize, to_json

__all__ = [
    "BOX_METRICS",
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
    "measure",
    "register_metric",
    "summarize",
    "to_json",
]
