"""Configs: composed by Hydra, validated against signatures, instantiated from an allow-list of names."""

from bcos_train.config.containers import load, overlay, save, to_container
from bcos_train.config.errors import UserError, user_errors_at
from bcos_train.config.instantiation import instantiate
from bcos_train.config.plugins import load_plugins, register_target
from bcos_train.config.targets import TARGETS
from bcos_train.config.validation import Problem, check

__all__ = [
    "TARGETS",
    "Problem",
    "UserError",
    "check",
    "instantiate",
    "load",
    "load_plugins",
    "overlay",
    "register_target",
    "save",
    "to_container",
    "user_errors_at",
]
