"""Weights to hand on, and what is known about them.

A source is a run folder, a checkpoint or file of weights in one, a checkpoint of the official training code, a state
dict, an exported folder, or ``official:<row>``. Nothing that a file holds is run: pickled objects are refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.weights import WEIGHTS, read_weights
from bcos_train.suggest import suggest
from bcos_train.zoo.records import RECORDS, ZooRecord, record
from bcos_train.zoo.weights import load_official

__all__ = ["CONFIG", "LIBRARY", "TIMM", "Source", "read_export_config", "read_source"]

#: The config of an exported folder, and how it is known as one of this package.
CONFIG, LIBRARY = "config.json", "bcos-train"
#: Before the name of a model of timm.
TIMM = "timm:"
RUN_CONFIG, RUN_SUMMARY, RUN_EVALUATION, LAST = "config.yaml", "summary.json", "evaluation.json", "last.ckpt"
OFFICIAL = "official:"
#: Where the official training code's checkpoints have the model and its average.
PREFIX, EMA_PREFIX = "model.", "ema.module."

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights and their description.

    Args:
        state: The state dict, as it was read.
        is_ema: Whether it is that of the average.
        origin: Where it is from, in a few words.
        name: The model; before one of timm's stands ``timm:``. ``None``: not known.
        options: The model's options, as far as they are known.
        dataset: What it was trained on.
        metrics: Results of a validation of these very weights: ``acc1`` and ``acc5`` in percent, ``loss``, ….
        n_images: Images that the metrics are of; ``None``: the whole validation set.
        class_names: In the order of the outputs.
        licence: Of the weights.
        preprocessing: ``None``: the model's own.
        is_official: Whether they are of the official release.
        began_official: Whether training began with official weights.
    """

    state: Mapping[str, Tensor]
    is_ema: bool
    origin: str
    name: str | None = None
    options: Mapping[str, Any]
    dataset: str | None = None
    metrics: Mapping[str, float]
    n_images: int | None = None
    class_names: tuple[str, ...] | None = None
    licence: str | None = None
    preprocessing: Preprocessing | None = None
    is_official: bool = False
    began_official: bool = False


def read_source(source: str, use_ema: bool | None = None) -> Source:
    """Read what ``source`` names.

    Args:
        source: As above.
        use_ema: Whether to take the averaged weights; ``None``: if there are any.

    Raises:
        ValueError: It isn't there, is damaged or something else, or has no averaged weights.
    """
    if source.startswith(OFFICIAL):
        row = record(source.removeprefix(OFFICIAL))
        if use_ema:
            raise ValueError(f"{source} comes without averaged weights: leave out --ema")
        return _official(row, load_official(row.name))
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder{_hint(source)}")
    if path.is_dir():
        return _read_folder(path, use_ema)
    return _read_file(path, use_ema)


def _hint(source: str) -> str:
    if source in RECORDS:
        return f"; did you mean {OFFICIAL}{source}?"
    return suggest(source, (f"{OFFICIAL}{name}" for name in RECORDS))


def _official(row: ZooRecord, state: Mapping[str, Tensor]) -> Source:
    return Source(
        state=state,
        is_ema=False,
        origin=f"the official release, file {row.file}",
        name=row.name,
        options={"num_classes": row.num_classes},
        dataset="imagenet",
        metrics={"acc1": row.top1, "acc5": row.top5},
        class_names=_class_names("imagenet", row.num_classes),
        licence=row.licence.lower(),
        is_official=True,
    )


def _read_folder(folder: Path, use_ema: bool | None) -> Source:
    if _is_export(folder):
        return _of_export(folder, use_ema)
    if (folder / RUN_CONFIG).is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder}: the run has not ended, so there is no {WEIGHTS}; give one of its checkpoints, "
                f"such as {folder / 'checkpoints' / LAST}"
            )
        return _of_run(folder, LAST, *read_weights(folder, use_ema))
    state, is_ema = read_weights(folder, use_ema)
    return Source(state=state, is_ema=is_ema, origin=folder.resolve().name, options={}, metrics={})


def _read_file(path: Path, use_ema: bool | None) -> Source:
    if path.suffix == ".safetensors" and _is_export(path.parent):
        return _of_export(path.parent, use_ema)
    is_ours = path.with_name(f"{path.name}.sha256").is_file()
    if path.suffix == ".safetensors" or is_ours:
        if (folder := _run_of(path)) is not None and path.suffix == ".safetensors":
            # The file itself says which of the two it is.
            is_average = path.name != WEIGHTS
            if use_ema not in (None, is_average):
                kept, option = ("averaged", "--no-ema") if is_average else ("plain", "--ema")
                raise ValueError(f"{path} holds the {kept} weights: leave out {option}, or give {folder}")
            return _of_run(folder, LAST, read_weights(path)[0], is_average)
        state, is_ema = read_weights(path, use_ema)
        if folder is not None:
            return _of_run(folder, path.name, state, is_ema)
        return Source(state=state, is_ema=is_ema, origin=path.name, options={}, metrics={})
    content = _load(path)
    if isinstance(content, dict) and "state_dict" in content and "pytorch-lightning_version" in content:
        return _of_official_training(path, content, use_ema)
    state, is_ema = read_weights(path, use_ema)
    row = next((row for row in RECORDS.values() if row.file == path.name), None)
    if row is not None and _sha256(path).startswith(row.sha256):
        return _official(row, state)
    return Source(state=state, is_ema=is_ema, origin=path.name, options={}, metrics={})


def _load(path: Path) -> Any:
    """What torch has saved, read without running anything."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise ValueError(
                f"{path} holds a Python object ({found[1]}), and reading that could run code; where you trust the "
                "file, save its state_dict alone with the program that wrote it"
            ) from error
        raise ValueError(f"{path} is no file of weights: {text[:200]}") from error


def _of_official_training(path: Path, content: Mapping[str, Any], use_ema: bool | None) -> Source:
    """A Lightning checkpoint of the official training code."""
    states = [
        {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)}
        for prefix in (PREFIX, EMA_PREFIX)
    ]
    is_ema = bool(states[1]) if use_ema is None else use_ema
    if is_ema and not states[1]:
        raise ValueError(f"{path} holds no averaged weights: leave out --ema")
    state = states[is_ema]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no checkpoint of the official training code: no tensors under {PREFIX}…")
    trained = content.get("hyper_parameters")
    trained = trained if isinstance(trained, dict) else {}
    key = (trained.get("base_network"), trained.get("experiment_name"))
    row = next((row for row in RECORDS.values() if (row.collection, row.experiment) == key), None)
    return Source(
        state=state,
        is_ema=is_ema,
        origin=f"{path.name}, a checkpoint of the official training code",
        name=None if row is None else row.name,
        options={},
        dataset=None if row is None else "imagenet",
        metrics={},
        class_names=None if row is None else _class_names("imagenet", row.num_classes),
    )


def _run_of(path: Path) -> Path | None:
    """The run folder that a file lies in."""
    folders = path.absolute().parents[:2]
    return next((folder for folder in folders if (folder / RUN_CONFIG).is_file()), None)


def _of_run(folder: Path, checkpoint: str, state: Mapping[str, Tensor], is_ema: bool) -> Source:
    """Weights of a run: those of one of its checkpoints; the last one has the run's final ones."""
    config = _read_yaml(folder / RUN_CONFIG)
    try:
        model, dataset = dict(config["model"]), dict(config["dataset"])
        name, target = str(model.pop("name")), str(model.pop("_target_"))
        data = str(dataset["_target_"]).rpartition(".")[2].lower()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RUN_CONFIG} is no config of a run") from error
    is_timm = target.endswith(".timm_model")
    began_official = not is_timm and (model.get("pretrained") is True or model.get("weights") == "official")
    metrics, n_images = _metrics(folder, checkpoint, is_ema, config.get("limit_val"))
    keys = ("_partial_", "pretrained", "weights", "progress", "backend")
    return Source(
        state=state,
        is_ema=is_ema,
        origin=f"run {folder.resolve().name}, {checkpoint}",
        name=f"{TIMM}{name}" if is_timm else name,
        options={key: value for key, value in model.items() if key not in keys},
        dataset=data,
        metrics=metrics,
        n_images=n_images,
        class_names=_class_names(data, None),
        preprocessing=Preprocessing.of_config(config.get("augmentation"), config.get("encoding")),
        began_official=began_official,
    )


def _metrics(folder: Path, checkpoint: str, is_ema: bool, limit: int | None) -> tuple[dict[str, float], int | None]:
    """Results of these very weights, and of how many images; none if there are none."""
    evaluation, file = folder / RUN_EVALUATION, folder / "checkpoints" / checkpoint
    if evaluation.is_file() and file.is_file() and evaluation.stat().st_mtime_ns >= file.stat().st_mtime_ns:
        found = _read_json(evaluation)
        if Path(str(found.get("weights"))).name == checkpoint and found.get("ema") == is_ema:
            keys = ("acc1", "acc5", "loss")
            return {key: float(found[key]) for key in keys if key in found}, int(found["count"])
    if checkpoint != LAST or not (folder / RUN_SUMMARY).is_file():
        return {}, None
    logged = _read_json(folder / RUN_SUMMARY).get("metrics", {})
    part = "val_ema/" if is_ema else "val/"
    metrics = {key.removeprefix(part): float(value) for key, value in logged.items() if key.startswith(part)}
    if not is_ema:
        metrics |= {key: float(value) for key, value in logged.items() if key.startswith("explanation/")}
    return metrics, limit


def _is_export(folder: Path) -> bool:
    path = folder / CONFIG
    return path.is_file() and _read_json(path).get("library_name") == LIBRARY


def read_export_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of an exported folder.

    Raises:
        ValueError: There is none, or it isn't one that this package has written.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no exported folder: it holds no {CONFIG}")
    config = _read_json(path)
    kinds = {"model_name": str, "model_args": dict, "num_classes": int, "averaged": bool, "sha256": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if config.get("library_name") != LIBRARY or wrong:
        missing = f" (no valid {', '.join(wrong)})" if wrong else ""
        raise ValueError(f"{path} is no config of an exported folder{missing}")
    return config


def _of_export(folder: Path, use_ema: bool | None) -> Source:
    config = read_export_config(folder)
    if use_ema not in (None, config["averaged"]):
        kept, option = ("averaged", "--no-ema") if config["averaged"] else ("plain", "--ema")
        raise ValueError(f"{folder} holds the {kept} weights alone: leave out {option}")
    names, values = config.get("label_names"), config.get("preprocessing")
    return Source(
        state=read_weights(folder, use_ema=False)[0],
        is_ema=config["averaged"],
        origin=config.get("origin", folder.resolve().name),
        name=config["model_name"],
        options={"num_classes": config["num_classes"], **config["model_args"]},
        dataset=config.get("dataset"),
        metrics=config.get("metrics", {}),
        n_images=config.get("n_images"),
        class_names=None if names is None else tuple(names),
        licence=config.get("license"),
        preprocessing=None if values is None else Preprocessing.of_json(values),
        is_official=config.get("is_official", False),
        began_official=config.get("began_official", False),
    )


def described_by(source: Source, name: str | None, options: Mapping[str, Any]) -> Source:
    """The source with what the user says about its model; another model than the known one has its own options."""
    if name is None or name == source.name:
        return replace(source, options={**source.options, **options})
    return replace(source, name=name, options=dict(options))


def _class_names(dataset: str, num_classes: int | None) -> tuple[str, ...] | None:
    if dataset == "imagenet":
        from torchvision.models import ResNet18_Weights

        names = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        names = {"cifar10": _CIFAR10, "digits": tuple("0123456789")}.get(dataset, ())
    return names if names and num_classes in (None, len(names)) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no config of a run")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
