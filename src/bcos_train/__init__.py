"""Train, evaluate and explain B-cos networks."""

import os

# Before torch loads OpenMP. By default its waiting threads spin for milliseconds; beside another busy process they then
# keep each other from the cores, and a step takes several times as long. OpenMP itself uses this count if it has more
# threads than cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from bcos_train import weights as _weights  # noqa: F401 - registers the official weights
from bcos_train.explanation import dynamic_linear_weights, explain, explanation_mode
from bcos_train.loading import LoadedClassifier, load
from bcos_train.model import create_model, list_models

__all__ = [
    "LoadedClassifier",
    "create_model",
    "dynamic_linear_weights",
    "explain",
    "explanation_mode",
    "list_models",
    "load",
]
__version__ = "0.1.0"
