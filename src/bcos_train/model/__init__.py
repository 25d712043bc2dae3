"""Architectures by name."""

from bcos_train.model import standard as _standard  # noqa: F401 - registers its models
from bcos_train.model.base import BcosModel
from bcos_train.model.registry import create_model, list_models, model_signature, register_model
from bcos_train.model.resnet import BasicBlock, BcosResNet, Bottleneck

__all__ = [
    "BasicBlock",
    "BcosModel",
    "BcosResNet",
    "Bottleneck",
    "create_model",
    "list_models",
    "model_signature",
    "register_model",
]
