"""B-cos layers and norms (pure torch)."""

from bcos_train.nn.activation import DetachableGELU, DetachableReLU
from bcos_train.nn.backend import BACKENDS, Backend, add_shortcut, cached_weights, live_weights, set_backend, why
from bcos_train.nn.conv import BcosConv2d, NormedConv2d
from bcos_train.nn.detachable import Detachable
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.linear import BcosLinear, Linear, NormedLinear
from bcos_train.nn.logit import LogitLayer
from bcos_train.nn.norm import (
    NORM_NAMES,
    AllNorm2d,
    AllNormUncentered2d,
    BatchNorm2d,
    BatchNormUncentered2d,
    DetachableGNInstanceNorm2d,
    DetachableGNLayerNorm2d,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    DetachablePositionNorm2d,
    GNInstanceNormUncentered2d,
    GNLayerNormUncentered2d,
    GroupNormUncentered2d,
    NoBias,
    Norm2d,
    NormFactory,
    PositionNormUncentered2d,
    RunningNorm2d,
    Unaffine,
    make_norm,
    sync_batch_norm_,
)

__all__ = [
    "BACKENDS",
    "NORM_NAMES",
    "AllNorm2d",
    "AllNormUncentered2d",
    "Backend",
    "BatchNorm2d",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLayer",
    "BcosLinear",
    "Detachable",
    "DetachableGELU",
    "DetachableGNInstanceNorm2d",
    "DetachableGNLayerNorm2d",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "DetachablePositionNorm2d",
    "DetachableReLU",
    "GNInstanceNormUncentered2d",
    "GNLayerNormUncentered2d",
    "GroupNormUncentered2d",
    "Linear",
    "LogitLayer",
    "NoBias",
    "Norm2d",
    "NormFactory",
    "NormedConv2d",
    "NormedLinear",
    "PositionNormUncentered2d",
    "RunningNorm2d",
    "Unaffine",
    "add_shortcut",
    "cached_weights",
    "live_weights",
    "make_norm",
    "set_backend",
    "sync_batch_norm_",
    "why",
]
