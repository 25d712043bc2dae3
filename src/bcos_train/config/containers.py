"""Convert configs to plain containers, which all other packages use, and save and load them."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from bcos_train.config.errors import UserError
from bcos_train.utils.atomic import atomic_write

__all__ = ["Config", "check_yaml", "join", "load", "overlay", "save", "to_container", "uninterpolated"]

#: A config, or a node of one, as plain containers.
Config = dict[str, Any]
#: Limits of a config file, far above any that describes a run.
MAX_DEPTH, MAX_VALUES = 40, 100_000


def join(path: str, key: object) -> str:
    """Return the key of a child as on the command line; list items are numbered from 0: ``a.0.b``."""
    return f"{path}.{key}" if path else str(key)


def to_container(config: Mapping[str, object], path: str = "") -> Config:
    """Convert to dicts, lists and scalars, interpolations resolved and without the ``hydra`` node. ``???`` is kept.

    Raises:
        UserError: An interpolation has no value.
    """
    if not OmegaConf.is_config(config):
        return dict(config)
    if isinstance(config, DictConfig) and "hydra" in config and not path:
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return _plain(config, resolve=True)
    except OmegaConfBaseException as error:
        key = join(path, error.full_key) if error.full_key else path or "config"
        raise UserError(f"{key}: {_reason(error)}") from error


def uninterpolated(config: Container) -> Config:
    """Convert to plain containers in which interpolations are text."""
    return _plain(config, resolve=False)


def _plain(config: object, resolve: bool) -> Config:
    plain: Any = OmegaConf.to_container(config, resolve=resolve, enum_to_str=True)
    return plain


def _reason(error: OmegaConfBaseException) -> str:
    """Return the first line of OmegaConf's message, without the class of the error that a resolver raised."""
    line = str(error).splitlines()[0]
    if isinstance(error, InterpolationToMissingValueError):
        return f"needs {line.rpartition(': ')[2]}, which has no value"
    return line.partition(" raised while resolving interpolation: ")[2].strip('"') or line


def overlay(base: Mapping[str, object], config: Mapping[str, object], keys: Iterable[str]) -> Config:
    """Return a copy of ``base`` with the values of ``config`` at the dotted ``keys``.

    Raises:
        UserError: A parent of a key is no mapping in ``base``.
    """
    merged = copy.deepcopy(dict(base))
    for key in keys:
        *parents, last = key.split(".")
        target: Any = merged
        source: Any = config
        for i, parent in enumerate(parents, 1):
            target, source = target.setdefault(parent, {}), source[parent]
            if not isinstance(target, dict):
                value = "null" if target is None else "a list" if isinstance(target, list) else f"{target}"
                raise UserError(f"{key}: {'.'.join(parents[:i])} is {value} in the run, so it has no keys")
        target[last] = copy.deepcopy(source[last])
    return merged


def save(config: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Write a resolved config as YAML; the file appears complete or not at all."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(to_container(config))), encoding="utf-8")


def load(path: str | os.PathLike[str]) -> Config:
    """Read a saved config. Nothing in the file is executed or resolved: ``${…}`` is text here.

    Raises:
        UserError: No such file, or not a YAML mapping.
    """
    try:
        check_yaml(Path(path))
        loaded = OmegaConf.to_container(OmegaConf.load(Path(path)), resolve=False)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the errors of yaml and OmegaConf share no base class
        raise UserError(f"{path}: not a config ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: not a config (a mapping is expected)")
    return {str(key): value for key, value in loaded.items()}


def check_yaml(path: Path) -> None:
    """Check that a YAML file can be read with little memory and without deep recursion; errors of YAML are ignored.

    Raises:
        UserError: It is nested too deeply, or its aliases repeat too much.
    """
    # The faster parser refuses deep nesting, but OmegaConf reads with the other one.
    for loader in (getattr(yaml, "CSafeLoader", yaml.SafeLoader), yaml.SafeLoader):
        try:
            _check_events(path, loader)
            return
        except yaml.YAMLError:
            continue


def _check_events(path: Path, loader: type[yaml.SafeLoader]) -> None:
    sizes: dict[str, int] = {}  # number of values below each anchor, with the aliases in it
    stack: list[tuple[str | None, int]] = [(None, 0)]  # anchor and number of values of each open collection
    with path.open(encoding="utf-8") as file:
        for event in yaml.parse(file, Loader=loader):
            anchor, size = None, 0
            if isinstance(event, yaml.CollectionStartEvent):
                stack.append((event.anchor, 1))
                if len(stack) > MAX_DEPTH:
                    raise UserError(f"{path}: nested more than {MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = stack.pop()
            elif isinstance(event, yaml.AliasEvent):
                size = sizes.get(event.anchor, MAX_VALUES)  # within its own anchor: without end
            elif isinstance(event, yaml.ScalarEvent):
                anchor, size = event.anchor, 1
            if anchor is not None:
                sizes[anchor] = size
            stack[-1] = (stack[-1][0], stack[-1][1] + size)
            if stack[-1][1] > MAX_VALUES:
                raise UserError(f"{path}: more than {MAX_VALUES:,} values, with those that aliases repeat")
