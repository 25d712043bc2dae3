"""Hydra's config loader, with a list of the keys that files may set under ``hydra``.

From that node Hydra builds loggers, callbacks and launchers, sets environment variables and writes Slurm scripts, so a
config that somebody sent could run code or empty a file. Only what Hydra itself, the project's main configs and the
command line put there is trusted. Everything else, from any other file and however it got there (packages, defaults
lists, interpolations), is compared with :data:`ALLOWED` before Hydra uses it.
"""

import copy
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bcos_train.config.annotations import mismatch
from bcos_train.config.containers import check_yaml, join, uninterpolated
from bcos_train.config.errors import UserError
from bcos_train.utils.suggestions import suggest
from bcos_train.utils.terminal import is_printable, printable

__all__ = ["ALLOWED", "BASIC_SWEEPER", "HydraLoader"]

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
#: Classes that the ``hydra`` node may name, also on the command line.
TARGETS = (
    BASIC_LAUNCHER,
    BASIC_SWEEPER,
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
#: Choices of Hydra's config groups that files may select. Their values are trusted.
CHOICES = {
    "hydra/launcher": ("basic", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("basic",),
    "hydra/job_logging": ("default", "disabled", "none", "stdout"),
    "hydra/hydra_logging": ("default", "disabled", "none"),
}
#: Keys that any file may set, with their types: a sweep, and the resources of its jobs.
ALLOWED: dict[str, object] = {
    "hydra.mode": Literal["RUN", "MULTIRUN"],
    "hydra.verbose": bool,
    "hydra.sweeper.max_batch_size": int | None,
    **{
        f"hydra.launcher.{key}": kind
        for kind, keys in {
            int: "array_parallelism max_num_timeout nodes signal_delay_s tasks_per_node timeout_min",
            int | None: "cpus_per_gpu cpus_per_task gpus_per_node gpus_per_task mem_gb",
            str | None: "account comment constraint exclude gres mem_per_cpu mem_per_gpu name partition qos",
            bool: "stderr_to_stdout",
        }.items()
        for key in keys.split()
    },
}
PARAMS = ("hydra", "sweeper", "params")
#: Text in these keys; a line break would end the comment that an option is in a Slurm script.
WORD = re.compile(r"[\w.,:=+*/@|&\[\]()-]*", re.ASCII)
#: Keys that Hydra writes after composing; they are not compared.
WRITTEN = (
    ("hydra", "job", "config_name"),
    ("hydra", "job", "override_dirname"),
    ("hydra", "overrides"),
    ("hydra", "runtime", "choices"),
    ("hydra", "runtime", "config_sources"),
    ("hydra", "runtime", "cwd"),
    ("hydra", "runtime", "version"),
    ("hydra", "runtime", "version_base"),
)

#: Placeholder for an interpolation that cannot be resolved yet.
UNRESOLVED = "${…}"

Path_ = tuple[object, ...]


class HydraLoader(ConfigLoaderImpl):
    """Composes configs, and refuses those in which a file sets a key under ``hydra`` that is not :data:`ALLOWED`.

    Args:
        config_search_path: Where Hydra looks for config files.
        trusted_dir: Folder whose main configs (``*.yaml``, not those of its groups) may set any key.
    """

    def __init__(self, config_search_path: ConfigSearchPath, trusted_dir: Path) -> None:
        super().__init__(config_search_path=config_search_path)
        self.repository = _Repository(config_search_path)
        self.trusted_dir = trusted_dir
        #: File and contents of each config of the latest composition, in order.
        self._files: list[tuple[str, Container]] = []

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a config as Hydra does.

        Raises:
            UserError: A file sets a key under ``hydra`` that is reserved for the command line.
        """
        self._files = []
        try:
            config = super().load_configuration(
                config_name, list(overrides), run_mode, from_shell, validate_sweep_overrides
            )
        except RecursionError as error:
            raise UserError("the config files refer to each other without end") from error
        self._check_files(config, overrides)
        _check_targets(config.hydra, "hydra")
        _check_launcher(config)
        return config

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        result = super()._load_single_config(default=default, repo=repo)
        self._files.append((f"{result.path}/{default.config_path}.yaml".removeprefix("file://"), result.config))
        return result

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: Any, repo: Any) -> None:
        # Before the others, since a source of the form pkg://… imports a module.
        loaded = None if config_name is None else repo.load_config(config_path=config_name)
        is_given = any(override.get_key_element() == "hydra.searchpath" for override in parsed_overrides)
        if loaded is not None and not is_given and loaded.path != f"file://{self.trusted_dir}":
            value = OmegaConf.select(loaded.config, "hydra.searchpath")
            if value is not None:
                raise _refused(("hydra", "searchpath"), value, f"{loaded.path}/{config_name}".removeprefix("file://"))
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _check_files(self, config: DictConfig, overrides: Sequence[str]) -> None:
        hydra = uninterpolated(config)["hydra"]
        written = [text for texts in hydra["overrides"].values() for text in texts]
        if sorted(map(str, written)) != sorted(overrides):
            raise _refused(("hydra", "overrides"), written, self._file(("hydra", "overrides")))
        trusted = self._trusted_leaves(config, overrides)
        problems = [
            (self._file(path), path, value)
            for path, value in _leaves(hydra, ("hydra",))
            if (path, repr(value)) not in trusted and path[:2] not in WRITTEN and path[:3] not in WRITTEN
        ]
        # Hydra copies some values of files to other keys; the one in a file is the cause.
        for file, path, value in sorted(problems, key=lambda problem: problem[0] is None):
            if not _is_known(path):
                raise _refused(path, value, file)
            if expected := _mismatch(path, value):
                raise UserError(f"{_setting(path, value)}{_in(file)}: expected {expected}")

    def _trusted_leaves(self, config: DictConfig, overrides: Sequence[str]) -> set[tuple[Path_, str]]:
        """Return the values, uninterpolated, that Hydra, the main configs and the command line give to keys."""
        chosen = config.hydra.runtime.choices
        choices = [f"{group}={chosen[group]}" for group, names in CHOICES.items() if chosen.get(group) in names]
        own, trusted = [], set()
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key, text = override.key_or_group, str(override.input_line)
            if key == "hydra.searchpath":
                # Not composed with: its files are not trusted.
                trusted.add((("hydra", "searchpath"), repr(override.value())))
            elif key.startswith("hydra.") and not override.is_delete() and override.package is None:
                own.append(f"++{text.lstrip('+')}")
        name = JobRuntime.instance().get("name")
        return {
            *trusted,
            *_leaves_of_hydra((*choices, *own), name),
            *_leaves_of_hydra((), name),
            *_leaves_of_main_configs(self.trusted_dir),
        }

    def _file(self, path: Path_) -> str | None:
        """Return the last file that contains the key, without Hydra's own."""
        for file, content in reversed(self._files):
            node: object = uninterpolated(content)
            for key in path:
                node = node.get(key) if isinstance(node, Mapping) else None
            if node is not None and not file.startswith(("pkg://", "structured://")):
                return file
        return None


class _Repository(ConfigRepository):
    """Hydra's access to the config files, which are checked before they are read."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = next((source for source in self.sources if source.is_config(config_path)), None)
        if source is not None and source.scheme() == "file":
            check_yaml(Path(source.path, config_path.removesuffix(".yaml") + ".yaml"))
        return super().load_config(config_path)


def _leaves(node: object, path: Path_) -> Iterator[tuple[Path_, object]]:
    """Yield all keys with a value that is not a mapping; lists are values."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, node


@functools.lru_cache(maxsize=256)
def _leaves_of_hydra(overrides: tuple[str, ...], job_name: str) -> frozenset[tuple[Path_, str]]:
    """Return the values of Hydra's own config with overrides, in a job of this name."""
    loader = ConfigLoaderImpl(create_config_search_path(None))
    return _hydra_leaves(loader.load_configuration(None, list(overrides), RunMode.RUN))


@functools.lru_cache(maxsize=32)
def _leaves_of_main_configs(folder: Path) -> frozenset[tuple[Path_, str]]:
    return frozenset(leaf for path in folder.glob("*.yaml") for leaf in _hydra_leaves(OmegaConf.load(path)))


def _hydra_leaves(config: DictConfig | ListConfig) -> frozenset[tuple[Path_, str]]:
    return frozenset(
        (path, repr(value)) for path, value in _leaves(uninterpolated(config).get("hydra") or {}, ("hydra",))
    )


def _name(path: Path_) -> str:
    return ".".join(map(str, path))


def _is_known(path: Path_) -> bool:
    return path[:3] == PARAMS if len(path) == 4 else _name(path) in ALLOWED and len(path) == _name(path).count(".") + 1


def _mismatch(path: Path_, value: object) -> str | None:
    """Return a description of the values that a file may give to a known key, or None if this is one."""
    if path[:3] == PARAMS:
        # An override of a job has the same power as one on the command line.
        key = str(path[3])
        if not re.fullmatch(r"\+{0,2}[\w./-]+", key) or re.split(r"[./]", key.lstrip("+"))[0] in ("hydra", "plugins"):
            return "a key of the config, except hydra and plugins"
        is_plain = isinstance(value, str | int | float | None) and "${" not in str(value)
        return None if is_plain else "values separated by commas"
    if isinstance(value, str) and not WORD.fullmatch(value):
        return f"letters, digits and {WORD.pattern[3:-2]}".replace("\\", "")
    return mismatch(value, ALLOWED[_name(path)])


def _refused(path: Path_, value: object, file: str | None) -> UserError:
    name = _name(path)
    launcher = [key for key in ALLOWED if key.startswith("hydra.launcher.")]
    allowed = launcher if path[:2] == ("hydra", "launcher") else [key for key in ALLOWED if key not in launcher]
    others = "" if path[:2] == ("hydra", "launcher") else ", hydra.sweeper.params.<key>, resources of hydra.launcher"
    return UserError(
        f"{_setting(path, value)}{_in(file)}: only the command line may set this key{suggest(name, ALLOWED)} "
        f"(allowed in files: {', '.join(allowed)}{others})"
    )


def _setting(path: Path_, value: object) -> str:
    return f"{_name(path)}={printable(str(value), keep='')[:60]}"


def _in(file: str | None) -> str:
    return "" if file is None else f" in {file}"


def _check_targets(node: object, path: str) -> None:
    """Raise a UserError if the ``hydra`` node names anything outside :data:`TARGETS`, also on the command line.

    Hydra instantiates callbacks, plugins and log handlers from that node without an allow-list.
    """
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
            # For example the job's number, known only inside a job. A target must be known now.
            value = UNRESOLVED
        rejected = key == "()" or (key == "_target_" and value not in TARGETS)
        if rejected or (key == "class" and not str(value).startswith("logging.")):
            raise UserError(f"{where}={value}: not an allowed name")
        _check_targets(value, where)


def _check_launcher(config: DictConfig) -> None:
    """Raise a UserError if a setting of a launcher has a line break, which would start a command in a Slurm script.

    Its folder is below the key ``runs`` of the config.
    """
    if config.hydra.launcher._target_ == BASIC_LAUNCHER:
        return
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    try:
        # For the ${hydra:…} resolver. Of a copy, since this makes a config read-only and launchers write into it.
        hydra_config.set_config(copy.deepcopy(config))
        launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
    finally:
        hydra_config.cfg = before
    for key, value in launcher.items():
        if isinstance(value, str) and not is_printable(value):
            raise UserError(f"hydra.launcher.{key}={value!r}: has control characters; see the keys runs and name")
