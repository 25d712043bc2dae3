"""Packages of the user that extend what a config may name.

A plugin is a module that calls ``register_model``, :func:`register_target` or another ``register_…`` function when it
is imported. It is imported only if the user names it: as ``plugins=[my_package]`` on the command line, or under
``plugins:`` in a YAML file of their own folder (``--config-dir``). A config that comes with a run or weights records
its plugins but cannot load them, since importing a module runs its code.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bcos_train.config.containers import load
from bcos_train.config.errors import UserError
from bcos_train.config.targets import REGISTERED

__all__ = ["KEY", "load_plugins", "missing_plugins", "plugins_in_folder", "register_target"]

#: The top-level key of a config.
KEY = "plugins"

Target = TypeVar("Target", bound=Callable[..., Any])


def register_target(target: Target) -> Target:
    """Allow a config to name a class or function of yours as ``_target_``; usable as a decorator.

    The name is ``<module>.<name>``, the typed keyword parameters are the config keys.

    Raises:
        ValueError: Not a class or function at the top level of an importable module.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not callable(target) or not module or not name:
        raise ValueError(f"register_target takes a class or a function, not {target!r}")
    if module == "__main__" or "." in name or not name.isidentifier():
        raise ValueError(f"{module}.{name}: a config can name classes and functions at the top of a module only")
    REGISTERED[f"{module}.{name}"] = target
    return target


def load_plugins(names: Iterable[Any]) -> None:
    """Import plugins, from the Python path or else from the current folder.

    Call this only with names that the user gave: it runs their code.

    Raises:
        UserError: No such module, or it needs one that is not installed.
    """
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{KEY}: {name!r} is not the name of a module; write {KEY}=[my_package]")
        # Console scripts do not have the current folder on the path. Last, so that it hides nothing installed.
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


def missing_plugins(config: Mapping[str, Any]) -> list[str]:
    """The plugins that a config names and that have not been imported."""
    names = config.get(KEY) or []
    return [str(name) for name in names if name not in sys.modules] if isinstance(names, (list, tuple)) else []


def plugins_in_folder(folder: Path) -> Iterator[str]:
    """All names under ``plugins:`` in the YAML files of a folder; files that cannot be read are skipped."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            names = load(path).get(KEY)
        except UserError:
            continue
        if isinstance(names, list):
            yield from map(str, names)
