"""B-cos layers and norms (pure torch)."""

from bcos_train.nn import norm
from bcos_train.nn.activation import DetachableGELU, DetachableReLU
from bcos_train.nn.backend import BACKENDS, Backend, fast, set_backend
from bcos_train.nn.conv import BcosConv2d, NormedConv2d
from bcos_train.nn.detachable import Detachable
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.linear import BcosLinear, Linear, NormedLinear
from bcos_train.nn.logit import LogitLayer
from bcos_train.nn.norm import *  # noqa: F403

cached_weights, live_weights, why = fast.cached_weights, fast.live_weights, fast.why

__all__ = [
    *norm.base.__all__,
    *norm.group.__all__,
    *norm.names.__all__,
    *norm.running.__all__,
    "BACKENDS",
    "Backend",
    "BcosConv2d",
    "BcosLayer",
    "BcosLinear",
    "Detachable",
    "DetachableGELU",
    "DetachableReLU",
    "Linear",
    "LogitLayer",
    "NormedConv2d",
    "NormedLinear",
    "cached_weights",
    "live_weights",
    "set_backend",
    "why",
]
