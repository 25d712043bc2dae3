"""The norms of B-cos networks: six kinds, centered and uncentered, and the layer norm of tokens."""

from bcos_train.nn.norm.base import Norm2d
from bcos_train.nn.norm.group import (
    DetachableGNInstanceNorm2d,
    DetachableGNLayerNorm2d,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    DetachablePositionNorm2d,
    GNInstanceNormUncentered2d,
    GNLayerNormUncentered2d,
    GroupNormUncentered2d,
    PositionNormUncentered2d,
)
from bcos_train.nn.norm.names import NORM_NAMES, NoBias, NormFactory, Unaffine, make_norm
from bcos_train.nn.norm.running import (
    AllNorm2d,
    AllNormUncentered2d,
    BatchNorm2d,
    BatchNormUncentered2d,
    RunningNorm2d,
    sync_batch_norm_,
)

__all__ = [
    "NORM_NAMES",
    "AllNorm2d",
    "AllNormUncentered2d",
    "BatchNorm2d",
    "BatchNormUncentered2d",
    "DetachableGNInstanceNorm2d",
    "DetachableGNLayerNorm2d",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "DetachablePositionNorm2d",
    "GNInstanceNormUncentered2d",
    "GNLayerNormUncentered2d",
    "GroupNormUncentered2d",
    "NoBias",
    "Norm2d",
    "NormFactory",
    "PositionNormUncentered2d",
    "RunningNorm2d",
    "Unaffine",
    "make_norm",
    "sync_batch_norm_",
]
