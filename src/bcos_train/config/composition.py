"""Compose configs with Hydra. Only this module and :mod:`~bcos_train.config.hydra_loader` import Hydra.

Hydra's public API composes too, but supports neither ``--config-dir`` nor sweeps, hence the private imports; they are
listed in CONTRIBUTING.md.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra._internal.hydra as hydra_main
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bcos_train.config.containers import Config, to_container, uninterpolated
from bcos_train.config.errors import UserError
from bcos_train.config.hydra_loader import BASIC_SWEEPER, HydraLoader
from bcos_train.utils.suggestions import suggest

__all__ = [
    "COMPOSITION_ERRORS",
    "FULL_ERROR",
    "Composer",
    "Override",
    "OverrideError",
    "OverrideType",
    "is_sweep_job",
    "job_overrides",
    "one_line",
    "parse_command_line",
    "parse_override",
    "project_config_dir",
    "run_jobs",
    "to_job_config",
]

#: Raised while a config is composed; :func:`one_line` shortens their messages.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
#: Raised by :meth:`Composer.parse`.
OverrideError = HydraException

#: Hydra's environment variable for full tracebacks.
FULL_ERROR = "HYDRA_FULL_ERROR"
VERSION_BASE = "1.3"

#: Key under which a recipe declares its intended use; removed from the job's config.
SUITS = "suits"


def project_config_dir() -> Path:
    """Return the folder ``configs``: inside the package if installed from a wheel, else at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


class Composer:
    """Compose configs from a folder of config groups, and list the choices of each group.

    Args:
        config_dir: Folder of the main configs.
        extra_dir: Additional folder of the user (``--config-dir``), searched after it.
        trusted_dir: Folder of the main configs that may set any key under ``hydra``; ``config_dir`` by default.

    Raises:
        UserError: A folder does not exist.
    """

    def __init__(
        self,
        config_dir: str | os.PathLike[str],
        extra_dir: str | os.PathLike[str] | None = None,
        trusted_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        for folder in (config_dir, extra_dir):
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"{folder}: no such folder of configs")
        hydra.version.setbase(VERSION_BASE)
        setup_globals()
        _add_models(Path(config_dir), None if extra_dir is None else Path(extra_dir))
        search_path = create_config_search_path(os.path.abspath(config_dir))
        if extra_dir is not None:
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{os.path.abspath(extra_dir)}", anchor)
        self._loader = HydraLoader(search_path, Path(trusted_dir or config_dir).absolute())
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._choices: dict[str, list[str]] = {}

    @cached_property
    def groups(self) -> list[str]:
        """All config groups, the project's before Hydra's."""
        return sorted(self._groups_below(""), key=lambda group: (group.startswith("hydra"), group))

    def choices(self, group: str) -> list[str]:
        """Return the choices of a group, without bases (names that begin with an underscore) and nested groups."""
        if group not in self._choices:
            options = self._loader.get_group_options(group, ObjectType.CONFIG)
            self._choices[group] = sorted(name for name in options if not name.startswith("_"))
        return self._choices[group]

    @property
    def main_configs(self) -> list[str]:
        """The choices of ``--config-name``."""
        return self.choices("")

    def _groups_below(self, group: str) -> Iterator[str]:
        for name in sorted(self._loader.list_groups(group)):
            if name.startswith("_"):
                continue
            inner = f"{group}/{name}" if group else name
            yield inner
            yield from self._groups_below(inner)

    def parse(self, override: str) -> Override:
        """Parse one ``key=value``. Raises :data:`OverrideError`."""
        return self._parser.parse_overrides([override])[0]

    def compose(self, config_name: str, overrides: Sequence[str] = ()) -> Config:
        """Return the config of one job as plain containers, interpolations resolved, without the ``hydra`` node.

        Raises:
            UserError: The overrides or the files do not make a config, or the recipe is not for these choices.
        """
        config = self._load(config_name, overrides, RunMode.RUN)
        hydra_config = HydraConfig.instance()
        before = hydra_config.cfg
        try:
            # The ${hydra:…} resolver reads this global.
            hydra_config.set_config(config)
            return to_job_config(config)
        finally:
            hydra_config.cfg = before

    def defaults(self, config_name: str) -> Config:
        """Return the config without overrides, interpolations unresolved, without the ``hydra`` node.

        Raises:
            UserError: The files do not make a config.
        """
        config = uninterpolated(self._load(config_name, (), RunMode.RUN))
        return {key: value for key, value in config.items() if key != "hydra"}

    def is_sweep(self, config_name: str, overrides: Sequence[str]) -> bool:
        """True if the config itself asks for several jobs (``hydra.mode: MULTIRUN``)."""
        return self._load(config_name, overrides, RunMode.MULTIRUN).hydra.mode == RunMode.MULTIRUN

    def jobs(self, config_name: str, overrides: Sequence[str]) -> list[list[str]]:
        """Return the overrides of every job of a sweep."""
        config = self._load(config_name, overrides, RunMode.MULTIRUN).hydra
        assert config.sweeper._target_ == BASIC_SWEEPER
        swept = [f"{key}={value}" for key, value in (config.sweeper.params or {}).items()]
        swept += _texts(config.overrides.task)
        fixed = _texts(config.overrides.hydra)
        batches = BasicSweeper.split_arguments(self._parser.parse_overrides(swept), None)
        return [[*fixed, *job] for batch in batches for job in batch]

    def _load(self, config_name: str, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        try:
            return self._loader.load_configuration(config_name, list(overrides), run_mode=mode)
        except UserError:
            raise
        except (*COMPOSITION_ERRORS, YAMLError, ValueError) as error:
            raise UserError(one_line(error)) from error


def to_job_config(config: DictConfig) -> Config:
    """Return the config of the current Hydra job as plain containers, after checking that its recipe fits the choices.

    A recipe may declare the choices that it doesn't support and, for the message, what it is for::

        suits:
          what: B-cos ConvNets on ImageNet
          not: {model: [standard_*, timm], dataset: [cifar10]}

    Raises:
        UserError: A choice matches one of these patterns, or an interpolation has no value.
    """
    job = to_container(config)
    suits = job.pop(SUITS, None) or {}
    choices = dict(HydraConfig.get().runtime.choices)
    recipe = f"recipe={choices['recipe']}" if "recipe" in choices else "recipe"  # it may be a list of recipes
    for group, patterns in suits.get("not", {}).items():
        if any(fnmatchcase(str(choices.get(group)), pattern) for pattern in patterns):
            raise UserError(f"{recipe}: not for {group}={choices[group]}; it is for {suits['what']}")
    return job


def parse_override(text: str) -> Override:
    """Parse one ``key=value``. Raises :data:`OverrideError`."""
    return OverridesParser.create().parse_overrides([text])[0]


def job_overrides() -> list[str]:
    """Return the overrides of the current job, as typed."""
    return _texts(HydraConfig.get().overrides.task)


def is_sweep_job() -> bool:
    """True if the current job belongs to a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def parse_command_line() -> Namespace:
    """Parse Hydra's flags and the ``overrides`` of ``sys.argv``.

    Raises:
        UserError: An unknown flag, or one that is not supported.
    """
    parser = get_args_parser()
    long_options = [f"--{name.replace('_', '-')}" for name in vars(parser.parse_args([])) if name != "overrides"]

    def error(message: str) -> NoReturn:
        prefix, _, rest = message.partition("unrecognized arguments: ")
        if prefix:
            raise UserError(message)
        flag = rest.split()[0]
        if near := suggest(flag.partition("=")[0], long_options):
            raise UserError(f"{flag}: no such option{near}")
        setting = flag.lstrip("-") + ("" if "=" in flag else "=…")
        raise UserError(f"{flag}: no such option; settings are written without dashes: {setting}")

    for argument in sys.argv[1:]:
        # argparse reads a long option with one dash as a short one with a value: -config-dir as -c onfig-dir.
        name = argument.partition("=")[0]
        if f"-{name}" in long_options:
            raise UserError(f"{name}: options have two dashes: -{name}")
    parser.error = error  # type: ignore[method-assign]
    arguments = parser.parse_args()
    if arguments.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported, because it unpickles a file")
    return arguments


def run_jobs(
    task: Callable[[DictConfig], None],
    config_dir: Path,
    config_name: str,
    extra_dir: Path | None = None,
    trusted_dir: Path | None = None,
) -> None:
    """Let Hydra handle ``sys.argv``: run ``task`` once or for every job of a sweep, print help, or complete words.

    Raises:
        UserError: Conflicting flags. Errors of :data:`COMPOSITION_ERRORS` pass through.
    """
    _add_models(config_dir, extra_dir)
    run = hydra.main(version_base=VERSION_BASE, config_path=str(config_dir), config_name=config_name)(task)
    module: Any = hydra_main
    loader = module.ConfigLoaderImpl
    try:
        # Every composition by Hydra is checked, right before it is used.
        module.ConfigLoaderImpl = partial(HydraLoader, trusted_dir=(trusted_dir or config_dir).absolute())
        run()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(one_line(error)) from error
    finally:
        module.ConfigLoaderImpl = loader


def _add_models(config_dir: Path, extra_dir: Path | None) -> None:
    """Add each registered model without a YAML file to the group ``model`` of the project's configs."""
    if config_dir.resolve() != project_config_dir():
        return
    # Imported here because the registry imports torch.
    from bcos_train.config.model_choices import model_choices

    store = ConfigStore.instance()
    files = {path.stem for folder in (config_dir, extra_dir) if folder for path in (folder / "model").glob("*.yaml")}
    for name, node in model_choices().items():
        if name not in files:
            store.store(group="model", name=name, node=node, package="_global_", provider="models")
        else:  # Hydra would use the stored config as the schema of the file
            store.repo.get("model", {}).pop(f"{name}.yaml", None)


def one_line(error: Exception) -> str:
    """Return the message of an error of Hydra or YAML and of its cause, without URLs and search paths."""
    parts = []
    for cause in filter(None, (error, error.__cause__)):
        text = re.split(r"\n(?:See http|Config search path|Search path:| +full_key:)", str(cause))[0]
        parts.append(" ".join(text.split()).rstrip("."))
    return "; ".join(part for part in parts if part) or type(error).__name__


def _texts(node: object) -> list[str]:
    """Return overrides as written; they may contain interpolations."""
    texts = OmegaConf.to_container(node, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]
