"""What a file or folder of weights holds: the weights, and the model that they are for as far as it is written down.

A run folder describes its model in ``config.yaml``, an exported folder in ``config.json``; both do so for the files of
weights within them as well. Options such as B change no tensor's shape: without the description weights would fit
another function.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.weights import EMA_WEIGHTS, WEIGHTS, file_sha256, read_file, read_weights

__all__ = ["CONFIG", "LAST", "LIBRARY", "RUN_CONFIG", "TIMM", "Description", "Source", "describe", "differences"]
__all__ += ["model_of_node", "read_json", "read_source"]

#: The config of an exported folder, and how it is known as one of this package.
CONFIG, LIBRARY = "config.json", "bcos-train"
#: The config of a run, the folder of its checkpoints, and the one of them with its final weights.
RUN_CONFIG, CHECKPOINTS, LAST = "config.yaml", "checkpoints", "last.ckpt"
#: Before the name of a model of timm.
TIMM = "timm:"
#: Options that may differ between training and use: the same weights then still give the same function.
_FREE = (
    "num_classes",
    "stochastic_depth_prob",
    "drop_rate",
    "drop_path_rate",
    "dropout",
    "memory_efficient",
    "backend",
    "grad_checkpointing",
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is written down beside weights.

    Args:
        name: The model; before one of timm's stands ``timm:``. ``None``: not known.
        options: The model's options, as far as they are known.
        preprocessing: ``None``: the model's own.
        folder: The run folder or exported folder; ``None``: in neither.
        is_export: Whether it is an exported folder.
        config: The content of the folder's config.
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    folder: Path | None = None
    is_export: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source(Description):
    """Weights and their description.

    Args:
        state: The state dict, as it was read.
        is_ema: Whether it is that of the average.
        origin: Where it is from, in a few words that name no place on this machine.
        trained: The hyperparameters in a checkpoint of the official training code; ``None``: it isn't one.
    """

    state: Mapping[str, Tensor]
    is_ema: bool
    origin: str
    trained: Mapping[str, Any] | None = None


def read_source(path: Path, use_ema: bool | None = None) -> Source:
    """Read a run folder, an exported folder, a file of weights in one of them, or any other file or folder of weights.

    Args:
        path: A file as for :func:`bcos_train.model.weights.read_file`, or a folder. A leading ``~`` is expanded.
        use_ema: Whether to take the averaged weights; ``None``: if there are any.

    Raises:
        ValueError: It isn't there, is damaged or something else, isn't the file that the config of an exported folder
            describes, or doesn't hold the weights that were asked for.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"weights={path}: no such file or folder")
    found, trained = describe(path), None
    is_weights = found.folder is not None and path.name in (WEIGHTS, EMA_WEIGHTS)
    if found.is_export:
        state, is_ema = _read_exported(found, use_ema), bool(found.config["averaged"])
    elif path.is_dir():
        if found.folder is not None and not (path / WEIGHTS).is_file():
            last = path / CHECKPOINTS / LAST
            raise ValueError(
                f"{path}: the run has not ended, so there is no {WEIGHTS}; give one of its checkpoints, such as {last}"
            )
        state, is_ema = read_weights(path, use_ema)
    elif is_weights:
        # The name says which of the two it is.
        is_ema = path.name == EMA_WEIGHTS
        _check_kind(path, is_ema, use_ema)
        state, is_ema = read_weights(path)[0], is_ema
    else:
        state, is_ema, trained = read_file(path, use_ema)
    origin = path.resolve().name
    if found.is_export:
        origin = found.config.get("origin", origin)
    elif found.folder is not None:
        file = LAST if path.is_dir() or is_weights else path.name
        origin = f"run {found.folder.resolve().name}, {file}"
    elif trained is not None:
        origin = f"{origin}, a checkpoint of the official training code"
    return Source(**vars(found), state=state, is_ema=is_ema, origin=origin, trained=trained)


def describe(path: Path) -> Description:
    """The description of a folder's weights, or of a file's by the folder that it lies in; an empty one without any.

    Raises:
        ValueError: There is one, but it can't be read.
    """
    folder = path if path.is_dir() else path.absolute().parent
    if (path.is_dir() or path.name == WEIGHTS) and (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if config.get("library_name") == LIBRARY:
            return _of_export(folder, config)
    if not path.is_dir() and folder.name == CHECKPOINTS:
        folder = folder.parent
    return _of_run(folder) if (folder / RUN_CONFIG).is_file() else Description()


def _of_export(folder: Path, config: Mapping[str, Any]) -> Description:
    kinds = {"model_name": str, "model_args": dict, "num_classes": int, "averaged": bool, "sha256": str}
    if wrong := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise ValueError(f"{folder / CONFIG} is no config of an exported folder (no valid {', '.join(wrong)})")
    values = config.get("preprocessing")
    return Description(
        name=config["model_name"],
        options={"num_classes": config["num_classes"], **config["model_args"]},
        preprocessing=None if values is None else Preprocessing.of_json(values),
        folder=folder,
        is_export=True,
        config=config,
    )


def _of_run(folder: Path) -> Description:
    import yaml

    path = folder / RUN_CONFIG
    try:
        config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        if "model" not in config:  # of another program
            return Description()
        name, options = model_of_node(config["model"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no config of a run ({' '.join(repr(error).split())})") from error
    preprocessing = Preprocessing.of_config(config.get("augmentation"), config.get("encoding"))
    return Description(name=name, options=options, preprocessing=preprocessing, folder=folder, config=config)


def model_of_node(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that a config's node ``model`` stands for."""
    keys = ("_target_", "_partial_", "name", "pretrained", "weights", "progress", "backend", "grad_checkpointing")
    is_timm = str(node.get("_target_")).endswith(".timm_model")
    options = {key: value for key, value in node.items() if key not in keys}
    return f"{TIMM if is_timm else ''}{node['name']}", options


def differences(found: Description, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """How a model differs from the described one in options that make it another function; empty if it doesn't.

    Args:
        found: What is known about the weights.
        options: Those that the model is built with.
        defaults: Of the options, for those that stand on one side alone.
    """
    trained, own = ({key: _plain(v) for key, v in {**defaults, **o}.items()} for o in (found.options, options))
    shared = [key for key in trained if key in own and key not in _FREE]
    keys = [key for key in shared if trained[key] is not own[key] and trained[key] != own[key]]
    if not keys:
        return ""
    theirs, ours = (", ".join(f"{key}={values[key]}" for key in keys) for values in (trained, own))
    command = " ".join(f"model.{key}={'null' if trained[key] is None else trained[key]}" for key in keys)
    # A file that scripts/export_weights.py has written says nothing of options.
    meant = "if the difference is meant, give a bare file of them, as scripts/export_weights.py writes it (.pth)"
    return f"were trained with {theirs}, the model has {ours}: give {theirs} (on the command line {command}); {meant}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_exported(found: Description, use_ema: bool | None) -> Mapping[str, Tensor]:
    assert found.folder is not None
    _check_kind(found.folder, found.config["averaged"], use_ema)
    path = found.folder / WEIGHTS
    state, _ = read_weights(found.folder, use_ema=False)
    if file_sha256(path) != found.config["sha256"]:
        raise ValueError(f"{path} isn't the file that {found.folder / CONFIG} describes: its SHA-256 differs")
    return state


def _check_kind(path: Path, is_ema: bool, use_ema: bool | None) -> None:
    if use_ema not in (None, is_ema):
        kinds = ("plain", "averaged")
        raise ValueError(f"{path} holds the {kinds[is_ema]} weights, not the {kinds[not is_ema]} ones")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: It can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content
