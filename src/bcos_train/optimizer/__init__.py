"""Optimizers by name and gradient clipping. Those of torch (Adam, AdamW, SGD, RMSprop) are used directly."""

from bcos_train.optimizer.clipping import adaptive_clip_grad_
from bcos_train.optimizer.fused import prefer_fused
from bcos_train.optimizer.timm_optimizer import timm_optimizer

__all__ = ["adaptive_clip_grad_", "prefer_fused", "timm_optimizer"]
