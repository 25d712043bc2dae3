"""Configs: composed by Hydra, checked against signatures, built from a list of allowed names."""

from bcos_train.config.check import Problem, check
from bcos_train.config.errors import UserError, blame
from bcos_train.config.instantiate import instantiate
from bcos_train.config.plain import load, overlay, save, to_plain
from bcos_train.config.targets import TARGETS

__all__ = ["TARGETS", "Problem", "UserError", "blame", "check", "instantiate", "load", "overlay", "save", "to_plain"]
