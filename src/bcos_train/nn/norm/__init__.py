"""The norms of B-cos networks: six kinds, centered and uncentered, and the layer norm of tokens."""

from bcos_train.nn.norm.base import *  # noqa: F403
from bcos_train.nn.norm.group import *  # noqa: F403
from bcos_train.nn.norm.names import *  # noqa: F403
from bcos_train.nn.norm.running import *  # noqa: F403
