"""Architectures by name."""

from bcos_train.model.base import BcosModel
from bcos_train.model.convnext import BcosConvNeXt
from bcos_train.model.densenet import BcosDenseNet
from bcos_train.model.plain_cnn import BcosPlainCnn
from bcos_train.model.registry import create_model, list_models, model_signature, register_model
from bcos_train.model.resnet import BasicBlock, BcosResNet, Bottleneck
from bcos_train.model.standard import StandardModel
from bcos_train.model.timm_model import timm_model
from bcos_train.model.vgg import BcosVGG
from bcos_train.model.vit import BcosSimpleViT, StandardSimpleViT

__all__ = [
    "BasicBlock",
    "BcosConvNeXt",
    "BcosDenseNet",
    "BcosModel",
    "BcosPlainCnn",
    "BcosResNet",
    "BcosSimpleViT",
    "BcosVGG",
    "Bottleneck",
    "StandardModel",
    "StandardSimpleViT",
    "create_model",
    "list_models",
    "model_signature",
    "register_model",
    "timm_model",
]
