"""The norms of B-cos networks: six kinds, centered and uncentered, and the layer norm of tokens."""

from bcos_train.nn.norm import base, group, names, running
from bcos_train.nn.norm.base import *  # noqa: F403
from bcos_train.nn.norm.group import *  # noqa: F403
from bcos_train.nn.norm.names import *  # noqa: F403
from bcos_train.nn.norm.running import *  # noqa: F403

__all__ = [*base.__all__, *group.__all__, *names.__all__, *running.__all__]
