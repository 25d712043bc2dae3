"""B-cos layers and norms (pure torch)."""

from bcos_train.nn.backend import BACKENDS, Backend, set_backend
from bcos_train.nn.conv import BcosConv2d, NormedConv2d
from bcos_train.nn.detachable import Detachable
from bcos_train.nn.frozen import frozen_weights, live_weights
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.linear import BcosLinear, NormedLinear, PlainLinear
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
    "DetachableGNInstanceNorm2d",
    "DetachableGNLayerNorm2d",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "DetachablePositionNorm2d",
    "GNInstanceNormUncentered2d",
    "GNLayerNormUncentered2d",
    "GroupNormUncentered2d",
    "LogitLayer",
    "NoBias",
    "Norm2d",
    "NormFactory",
    "NormedConv2d",
    "NormedLinear",
    "PlainLinear",
    "PositionNormUncentered2d",
    "RunningNorm2d",
    "Unaffine",
    "frozen_weights",
    "live_weights",
    "make_norm",
    "set_backend",
    "sync_batch_norm_",
]
