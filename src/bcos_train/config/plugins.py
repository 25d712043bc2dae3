"""Plugins: the user's packages that add models, targets and data sets to those that a config may name.

A plugin is a module that calls ``register_model``, :func:`register_target` or another ``register_…`` function when it
is imported. It is imported only if the user names it on the command line: ``plugins=[my_package]``. A config file, such
as that of a run, records its plugins but cannot load them, since importing a module runs its code.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from bcos_train.config.errors import UserError
from bcos_train.config.targets import REGISTERED

__all__ = ["KEY", "load_plugins", "missing_plugins", "register_target"]

#: Top-level key of a config.
KEY = "plugins"

Target = TypeVar("Target", bound=Callable[..., object])


def register_target(target: Target) -> Target:
    """Allow configs to name a class or function as ``_target_``; usable as a decorator.

    The name is ``<module>.<name>``, the typed keyword parameters are the config keys.

    Raises:
        ValueError: Not a class or function at the top level of an importable module.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not callable(target) or not module or not name:
        raise ValueError(f"register_target takes a class or a function, not {target!r}")
    if module == "__main__" or "." in name or not name.isidentifier():
        raise ValueError(f"{module}.{name}: a config can only name classes and functions at the top level of a module")
    REGISTERED[f"{module}.{name}"] = target
    return target


def load_plugins(names: Iterable[object]) -> None:
    """Import plugins, from the Python path or else from the current folder.

    Pass only names that the user entered, since importing runs code.

    Raises:
        UserError: No such module, or one of its imports is not installed.
    """
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{KEY}: {name!r} is not the name of a module; write {KEY}=[my_package]")
        # Console scripts do not have the current folder on the path. Appended, so that it shadows no installed package.
        if (folder := os.getcwd()) not in sys.path:
            sys.path.append(folder)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                text = f"no module named {error.name}, neither on the Python path nor in {folder}"
            else:
                text = f"{error.name}, which {name} imports, is not installed"
            raise UserError(f"{KEY}={name}: {text}") from error


def missing_plugins(config: Mapping[str, object]) -> list[str]:
    """Return the plugins that a config names and that have not been imported."""
    names = config.get(KEY) or []
    return [str(name) for name in names if name not in sys.modules] if isinstance(names, (list, tuple)) else []
