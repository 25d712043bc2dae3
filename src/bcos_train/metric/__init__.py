"""Explanation metrics, as pure functions."""

from bcos_train.metric.alignment import cosine_alignment
from bcos_train.metric.completeness import completeness_error

__all__ = ["completeness_error", "cosine_alignment"]
