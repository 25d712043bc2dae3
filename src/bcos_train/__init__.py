"""Train, evaluate and explain B-cos networks."""

from bcos_train import weights as _weights  # noqa: F401 - registers the official weights
from bcos_train.explanation import explain, explanation_mode
from bcos_train.loading import LoadedClassifier, load
from bcos_train.model import create_model, list_models

__all__ = ["LoadedClassifier", "create_model", "explain", "explanation_mode", "list_models", "load"]
__version__ = "0.1.0"
