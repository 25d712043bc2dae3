"""Read weights from anywhere, together with everything that is known about them.

Sources are a run folder, an exported folder, a weights file inside either, a checkpoint of the official training code
or of another program, any other state dict file, and the official release. Nothing in a file is executed: pickled
objects are ignored or refused.

A run folder describes its model in ``config.yaml``, an exported folder in ``config.json``; both descriptions hold for
the weights files inside the folder too. Options such as B change no tensor's shape: without the description the weights
would load into a different function.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from torch import Tensor

from bcos_train.model import list_models
from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.registry import OFFICIAL
from bcos_train.runs.layout import (
    CHECKPOINT_SUFFIX,
    CHECKPOINTS,
    EMA_WEIGHTS,
    EXPORT_CONFIG,
    LAST,
    LIBRARY,
    RUN_CONFIG,
    WEIGHTS,
)
from bcos_train.utils.files import file_sha256
from bcos_train.utils.suggestions import suggest
from bcos_train.weights import records, run_source
from bcos_train.weights.download import load_official
from bcos_train.weights.files import read_file, read_json
from bcos_train.weights.model_options import TIMM, known_options, model_of_config, option_differences

__all__ = ["ExportConfig", "WeightsSource", "read_export_config", "read_model_weights", "read_weights_source"]

#: Prefix of the official weights of a model, ``official:resnet50``.
_OFFICIAL_PREFIX = f"{OFFICIAL}:"


class ExportConfig(TypedDict, total=False):
    """Content of an exported folder's ``config.json``; see :func:`bcos_train.weights.model_card.export_config`."""

    library_name: Required[str]
    model_name: Required[str]
    num_classes: Required[int]
    model_args: Required[dict[str, object]]
    averaged: Required[bool]
    sha256: Required[str]
    architecture: str
    activation: str
    preprocessing: dict[str, object]
    pretrained_cfg: dict[str, object]
    origin: str
    is_official: bool
    from_official: bool
    dataset: str
    metrics: dict[str, float]
    n_images: int
    license: str
    label_names: list[str]


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Weights and everything that is known about them.

    Args:
        state: The state dict as it was read; its keys may have a prefix.
        is_ema: True if these are averaged weights.
        origin: Where the weights come from, in a few words without any path on this machine.
        label: Name in messages: the path or name as given.
        folder: The run folder or exported folder that describes them, if any.
        model_name: The model, ``timm:<name>`` for one of timm's; ``None``: unknown.
        options: The model's options as far as they are known.
        preprocessing: Inference transform; ``None``: the model's own.
        activation: ``"sigmoid"`` or ``"softmax"``, converts logits to probabilities under the loss of the training;
            ``None``: the model's own.
        class_names: Recorded class names in the order of the outputs; ``None``: none are recorded.
        dataset: Name of the training data set.
        metrics: Validation results of exactly these weights: ``acc1`` and ``acc5`` in percent, ``loss``, ….
        n_images: Number of images behind the metrics; ``None``: the whole validation set.
        license: License of the weights, as an identifier of the Hugging Face Hub.
        is_official: True for weights of the official release.
        from_official: True if training started from official weights.
    """

    state: Mapping[str, Tensor]
    is_ema: bool
    origin: str
    label: str
    folder: Path | None = None
    model_name: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    activation: str | None = None
    class_names: tuple[str, ...] | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    n_images: int | None = None
    license: str | None = None
    is_official: bool = False
    from_official: bool = False

    @property
    def class_names_or_usual(self) -> tuple[str, ...] | None:
        """The recorded class names, else those that the training data set usually has; ``None``: unknown."""
        if self.class_names is not None or self.dataset is None:
            return self.class_names
        return run_source.class_names_of(self.dataset)

    def for_model(self, name: str | None, options: Mapping[str, object]) -> "WeightsSource":
        """Apply the user's model name and options.

        If the name differs from the known one, only these options apply. Metrics belong to the trained function, so
        they are dropped if the options change it.
        """
        if name is not None and name != self.model_name:
            return replace(self, model_name=name, options=dict(options), metrics={}, n_images=None)
        merged = replace(self, options={**self.options, **options})
        if self.model_name is None or not option_differences(
            self.options, merged.options, known_options(self.model_name)
        ):
            return merged
        return replace(merged, metrics={}, n_images=None)

    def check_model(self, name: str, options: Mapping[str, object]) -> None:
        """Raise a ValueError if the folder of these weights describes another model, or other options.

        Args:
            name: The model to load them into, registered or not.
            options: Its options.
        """
        if self.folder is None:
            return
        if self.model_name != name:
            raise ValueError(f"{self.label} holds weights of {self.model_name}, not of {name}")
        is_known = name.startswith(TIMM) or name in list_models()
        if message := option_differences(self.options, options, known_options(name) if is_known else {}):
            raise ValueError(f"weights={self.label} {message}")


def read_weights_source(
    source: str | os.PathLike[str], use_ema: bool | None = None, *, progress: bool = True
) -> WeightsSource:
    """Read weights and what is known about them.

    Args:
        source: A run folder; an exported folder; a weights file (``.safetensors``, ``.pth``, ``.ckpt``, …); or, as a
            string, ``official:<model>`` or just a model's name for its official weights. A name wins over a file or
            folder of the same name (give that as ``./name``).
        use_ema: True for the averaged weights, False for the plain ones; ``None``: averaged if there are any.
        progress: Show a download progress bar.

    Raises:
        ValueError: The source is missing, damaged or not weights, is not the file that an exported folder's config
            describes, or lacks the requested weights.
    """
    if isinstance(source, str) and source.startswith(_OFFICIAL_PREFIX):
        return _read_official(source.removeprefix(_OFFICIAL_PREFIX), use_ema, progress)
    if isinstance(source, str) and source in list_models():
        return _read_official(source, use_ema, progress)
    path = Path(source).expanduser()
    if not path.exists():
        names = [*list_models(), *(f"{_OFFICIAL_PREFIX}{name}" for name in records.RECORDS)]
        raise ValueError(f"{source}: no such file, folder or model{suggest(str(source), names)}")
    return _read_path(path, str(source), use_ema)


def read_model_weights(
    name: str, weights: str | os.PathLike[str], use_ema: bool | None = None, *, progress: bool = True
) -> WeightsSource:
    """Read the weights that a model's option ``weights`` refers to.

    Args:
        name: Model name.
        weights: ``"official"``, or a path as for :func:`read_weights_source`.
        use_ema: As there.
        progress: Show a download progress bar.

    Raises:
        ValueError: As there; for ``"official"``, the model is unknown or has no official weights.
    """
    if weights == OFFICIAL:
        return _read_official(name, use_ema, progress)
    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"weights={weights}: no such file{suggest(str(weights), [OFFICIAL])}")
    return _read_path(path, str(weights), use_ema)


def _read_official(name: str, use_ema: bool | None, progress: bool) -> WeightsSource:
    record = records.find_record(name)
    if use_ema:
        raise ValueError(f"the official weights of {name} have no averaged ones: use_ema=false")
    return _official(record, load_official(name, progress), f"the official file of {name}")


def _official(record: records.ZooRecord, state: Mapping[str, Tensor], label: str) -> WeightsSource:
    return WeightsSource(
        state=state,
        is_ema=False,
        origin=f"the official release, file {record.file}",
        label=label,
        model_name=record.name,
        options={"num_classes": record.num_classes},
        dataset="imagenet",
        metrics={"acc1": record.top1, "acc5": record.top5},
        class_names=run_source.class_names_of("imagenet"),
        license=record.license.lower(),
        is_official=True,
    )


def _read_path(path: Path, label: str, use_ema: bool | None) -> WeightsSource:
    if (export_config := read_export_config(path)) is not None:
        return _read_export(path, label, export_config, use_ema)
    if path.name in (RUN_CONFIG, EXPORT_CONFIG) and path.is_file():
        raise ValueError(f"{label} only describes weights: give its folder, {path.parent}")
    folder = path if path.is_dir() else path.absolute().parent
    if not path.is_dir() and folder.name == CHECKPOINTS:
        folder = folder.parent
    if (folder / RUN_CONFIG).is_file() and (config := run_source.read_run_config(folder)) is not None:
        return _read_run(path, label, folder, config, use_ema)
    return _read_bare(path, label, use_ema)


def _read_bare(path: Path, label: str, use_ema: bool | None) -> WeightsSource:
    """Read weights that no folder describes; official files and training checkpoints are recognized."""
    name, file = path.resolve().name, read_file(path, use_ema)
    parameters = file.hyper_parameters or {}
    if {"base_network", "experiment_name"} <= parameters.keys():
        origin = f"{name}, a checkpoint of the official training code"
        source = WeightsSource(state=file.state, is_ema=file.is_ema, origin=origin, label=label)
        key = (parameters["base_network"], parameters["experiment_name"])
        record = next((r for r in records.RECORDS.values() if (r.collection, r.experiment) == key), None)
        if record is None:
            return source
        names = run_source.class_names_of("imagenet")
        return replace(source, model_name=record.name, dataset="imagenet", class_names=names)
    record = next((r for r in records.RECORDS.values() if r.file == path.name), None)
    if record is not None and file_sha256(path).startswith(record.sha256):
        return _official(record, file.state, label)
    return WeightsSource(state=file.state, is_ema=file.is_ema, origin=name, label=label, class_names=file.class_names)


def _read_run(path: Path, label: str, folder: Path, config: Mapping[str, Any], use_ema: bool | None) -> WeightsSource:
    is_final = path.is_dir() or path.name in (WEIGHTS, EMA_WEIGHTS)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            last = path / CHECKPOINTS / LAST
            raise ValueError(
                f"{path}: the run has not finished, so there is no {WEIGHTS}; use a checkpoint, such as {last}"
            )
        file = read_file(path, use_ema)
    elif is_final:
        _check_kind(path, path.name == EMA_WEIGHTS, use_ema)
        file = replace(read_file(path), is_ema=path.name == EMA_WEIGHTS)
    else:
        file = read_file(path, use_ema)
    # The last checkpoint holds the final weights too, so its name represents them in the origin and the metrics.
    checkpoint = LAST if is_final or path.suffix != CHECKPOINT_SUFFIX else path.name
    origin = f"run {folder.resolve().name}, {LAST if is_final else path.name}"
    name, options = model_of_config(config["model"])
    dataset = run_source.dataset_of(config)
    metrics, n_images = run_source.read_results(folder, checkpoint, file.is_ema, config.get("limit_val"))
    return WeightsSource(
        state=file.state,
        is_ema=file.is_ema,
        origin=origin,
        label=label,
        folder=folder,
        model_name=name,
        options=options,
        preprocessing=Preprocessing.from_config(
            config.get("augmentation"), config.get("encoding"), config.get("dataset")
        ),
        activation=run_source.activation_of(config),
        class_names=file.class_names,
        dataset=dataset,
        metrics=metrics,
        n_images=n_images,
        from_official=run_source.starts_from_official(config["model"]),
    )


def _read_export(path: Path, label: str, config: ExportConfig, use_ema: bool | None) -> WeightsSource:
    folder = path if path.is_dir() else path.absolute().parent
    _check_kind(folder, config["averaged"], use_ema)
    state = read_file(folder, use_ema=False).state
    if file_sha256(folder / WEIGHTS) != config["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {folder / EXPORT_CONFIG} describes: its SHA-256 differs"
        )
    preprocessing, names = config.get("preprocessing"), config.get("label_names")
    return WeightsSource(
        state=state,
        is_ema=config["averaged"],
        origin=config.get("origin", path.resolve().name),
        label=label,
        folder=folder,
        model_name=config["model_name"],
        options={"num_classes": config["num_classes"], **config["model_args"]},
        preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
        activation=config.get("activation"),
        class_names=None if names is None else tuple(names),
        dataset=config.get("dataset"),
        metrics=config.get("metrics", {}),
        n_images=config.get("n_images"),
        license=config.get("license"),
        is_official=config.get("is_official", False),
        from_official=config.get("from_official", False),
    )


def read_export_config(path: Path) -> ExportConfig | None:
    """Read the config of an exported folder.

    Args:
        path: The folder, or the weights file in it.

    Returns:
        The config; ``None`` if there is none, or it belongs to another program.

    Raises:
        ValueError: The config can't be read, or a required key is missing or invalid.
    """
    folder = path if path.is_dir() else path.absolute().parent
    file = folder / EXPORT_CONFIG
    if not (path.is_dir() or path.name == WEIGHTS) or not file.is_file():
        return None
    config = read_json(file)
    if config.get("library_name") != LIBRARY:
        return None
    kinds = {"model_name": str, "model_args": dict, "num_classes": int, "averaged": bool, "sha256": str}
    if missing := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise ValueError(f"{file} is not the config of an exported folder (no valid {', '.join(missing)})")
    return cast(ExportConfig, config)  # validated as far as it is required


def _check_kind(path: Path, is_ema: bool, use_ema: bool | None) -> None:
    if use_ema not in (None, is_ema):
        kinds = ("plain", "averaged")
        raise ValueError(f"{path} holds the {kinds[is_ema]} weights, not the {kinds[not is_ema]} ones")
