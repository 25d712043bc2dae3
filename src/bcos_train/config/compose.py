"""The one place that touches Hydra's insides: search path, groups, composition, sweeps.

Hydra's public API composes too, but knows neither ``--config-dir`` nor sweeps.
"""

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bcos_train.config.errors import UserError
from bcos_train.config.plain import join, to_plain

__all__ = ["Composer", "finish", "one_line", "texts"]

VERSION_BASE = "1.3"

#: What Hydra's own part of a config may name.
HYDRA_TARGETS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)


#: The key under which a recipe says what it is for; it is gone from the finished config.
SUITS = "suits"

#: Stands for a value that an interpolation doesn't give yet.
UNRESOLVED = "${…}"


class Composer:
    """Composes configs from a folder of config groups, and says what there is to choose from.

    Args:
        config_dir: The folder of the main configs.
        extra_dir: A further folder, searched after it.
    """

    def __init__(self, config_dir: str | os.PathLike[str], extra_dir: str | os.PathLike[str] | None = None) -> None:
        for folder in (config_dir, extra_dir):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{folder}: no such folder of configs")
        hydra.version.setbase(VERSION_BASE)
        setup_globals()
        search_path = create_config_search_path(os.path.abspath(config_dir))
        if extra_dir is not None:
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{os.path.abspath(extra_dir)}", anchor)
        self._loader = ConfigLoaderImpl(config_search_path=search_path)
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._choices: dict[str, list[str]] = {}

    @cached_property
    def groups(self) -> list[str]:
        """All config groups, the project's before Hydra's own."""
        found = list(self._groups_below(""))
        return sorted(found, key=lambda group: (group.startswith("hydra"), group))

    def choices(self, group: str) -> list[str]:
        """The options of a group. Files in its inner folders are for others to build on, or a group of their own."""
        if group not in self._choices:
            self._choices[group] = self._options(group)
        return self._choices[group]

    @cached_property
    def main_configs(self) -> list[str]:
        """What ``--config-name`` may say."""
        return self._options("")

    def _options(self, group: str) -> list[str]:
        # One that begins with an underscore is there for others to build on, or Hydra's own.
        found = self._loader.get_group_options(group, ObjectType.CONFIG)
        return sorted(name for name in found if not name.startswith("_"))

    def _groups_below(self, group: str) -> Iterator[str]:
        for name in sorted(self._loader.list_groups(group)):
            if name.startswith("_"):
                continue
            inner = f"{group}/{name}" if group else name
            yield inner
            yield from self._groups_below(inner)

    def parse(self, override: str) -> Override:
        """Read one ``key=value``. Raises hydra's ``OverrideParseException``."""
        return self._parser.parse_overrides([override])[0]

    def compose(self, config_name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The config of one job as plain containers, interpolations resolved, without Hydra's own part.

        Raises:
            UserError: The overrides or the files don't make a config, or the recipe is for others.
        """
        config = self._load(config_name, overrides, RunMode.RUN)
        config_of_hydra = HydraConfig.instance()
        before = config_of_hydra.cfg
        try:
            # The ${hydra:…} resolver looks here.
            config_of_hydra.set_config(config)
            return finish(config)
        finally:
            config_of_hydra.cfg = before

    def is_sweep(self, config_name: str, overrides: Sequence[str]) -> bool:
        """Whether the config itself asks for several jobs (``hydra.mode: MULTIRUN``)."""
        return self._load(config_name, overrides, RunMode.MULTIRUN).hydra.mode == RunMode.MULTIRUN

    def jobs(self, config_name: str, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of every job of a sweep."""
        config = self._load(config_name, overrides, RunMode.MULTIRUN).hydra
        assert config.sweeper._target_ == HYDRA_TARGETS[1]
        swept = [f"{key}={value}" for key, value in (config.sweeper.params or {}).items()]
        swept += texts(config.overrides.task)
        fixed = texts(config.overrides.hydra)
        batches = BasicSweeper.split_arguments(self._parser.parse_overrides(swept), None)
        return [[*fixed, *job] for batch in batches for job in batch]

    def _load(self, config_name: str, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        try:
            config = self._loader.load_configuration(config_name, list(overrides), run_mode=mode)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            raise UserError(one_line(error)) from error
        _refuse_foreign_code(config.hydra, "hydra")
        return config


def finish(config: DictConfig) -> dict[str, Any]:
    """The config of the job that Hydra has set, as plain containers, after a look at what its recipe is for.

    A recipe may say what it makes no sense with, and for the message what it is for::

        suits:
          what: B-cos ConvNets on ImageNet
          not: {model: [standard_*, timm], dataset: [cifar10]}

    Raises:
        UserError: A choice matches one of these patterns, or an interpolation leads nowhere.
    """
    plain: dict[str, Any] = to_plain(config)
    suits = plain.pop(SUITS, None) or {}
    choices = dict(HydraConfig.get().runtime.choices)
    recipe = f"recipe={choices['recipe']}" if "recipe" in choices else "recipe"  # it may be a list of them
    for group, patterns in suits.get("not", {}).items():
        if any(fnmatchcase(str(choices.get(group)), pattern) for pattern in patterns):
            raise UserError(f"{recipe}: not for {group}={choices[group]}; it is for {suits['what']}")
    return plain


def _refuse_foreign_code(node: Any, path: str) -> None:
    """Hydra builds callbacks, plugins and log handlers from its own part of the config, by a looser rule than ours."""
    if isinstance(node, DictConfig):
        keys: list[Any] = list(node)
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return
    for key in keys:
        where = join(path, key)
        try:
            value = node[key]
        except OmegaConfBaseException:
            # Known only within a job, such as its number; no reason to leave open what is called.
            value = UNRESOLVED
        refused = key == "()" or (key == "_target_" and value not in HYDRA_TARGETS)
        if refused or (key == "class" and not str(value).startswith("logging.")):
            raise UserError(f"{where}={value}: not a name that a config may use")
        _refuse_foreign_code(value, where)


def one_line(error: Exception) -> str:
    """A message of Hydra's or YAML's, and that of its cause, without addresses and search paths."""
    parts = []
    for cause in filter(None, (error, error.__cause__)):
        text = re.split(r"\n(?:See http|Config search path|Search path:| +full_key:)", str(cause))[0]
        parts.append(" ".join(text.split()).rstrip("."))
    return "; ".join(part for part in parts if part) or type(error).__name__


def texts(node: Any) -> list[str]:
    """Overrides as written: they may hold interpolations."""
    written = OmegaConf.to_container(node, resolve=False)
    assert isinstance(written, list)
    return [str(text) for text in written]
