"""Weights to hand on, and what is known about them.

A source is a run folder, a checkpoint or file of weights in one, a checkpoint of the official training code, a state
dict, an exported folder, or ``official:<row>``. Nothing that a file holds is run: pickled objects are refused.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bcos_train.model import model_signature, timm_model
from bcos_train.model import source as weights
from bcos_train.model.source import LAST, TIMM
from bcos_train.model.weights import file_sha256
from bcos_train.suggest import suggest
from bcos_train.weights.download import load_official
from bcos_train.weights.records import RECORDS, ZooRecord, record

__all__ = ["Source", "described_by", "known_options", "read_source"]

RUN_SUMMARY, RUN_EVALUATION = "summary.json", "evaluation.json"
OFFICIAL = "official:"

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Source(weights.Source):
    """Weights, their description, and what to tell others about them.

    Args:
        dataset: What it was trained on.
        metrics: Results of a validation of these very weights: ``acc1`` and ``acc5`` in percent, ``loss``, ….
        n_images: Images that the metrics are of; ``None``: the whole validation set.
        class_names: In the order of the outputs.
        licence: Of the weights.
        is_official: Whether they are of the official release.
        began_official: Whether training began with official weights.
    """

    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    n_images: int | None = None
    class_names: tuple[str, ...] | None = None
    licence: str | None = None
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
    found = Source(**vars(weights.read_source(path, use_ema)))
    if found.is_export:
        return _of_export(found)
    if found.folder is not None:
        return _of_run(found, LAST if path.is_dir() or path.suffix != ".ckpt" else path.name)
    if found.trained is not None:
        return _of_official_training(found)
    known = next((row for row in RECORDS.values() if row.file == path.name), None)
    return _official(known, found.state) if known is not None and file_sha256(path).startswith(known.sha256) else found


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


def _of_official_training(found: Source) -> Source:
    """A Lightning checkpoint of the official training code."""
    assert found.trained is not None
    key = (found.trained.get("base_network"), found.trained.get("experiment_name"))
    row = next((row for row in RECORDS.values() if (row.collection, row.experiment) == key), None)
    if row is None:
        return found
    return replace(found, name=row.name, dataset="imagenet", class_names=_class_names("imagenet", row.num_classes))


def _of_run(found: Source, checkpoint: str) -> Source:
    """Weights of a run: those of one of its checkpoints; the last one has the run's final ones."""
    assert found.folder is not None
    assert found.name is not None
    try:
        model = found.config["model"]
        data = str(found.config["dataset"]["_target_"]).rpartition(".")[2].lower()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{found.folder / weights.RUN_CONFIG} is no config of a run: it names no data set") from error
    is_timm = found.name.startswith(TIMM)
    metrics, n_images = _metrics(found.folder, checkpoint, found.is_ema, found.config.get("limit_val"))
    return replace(
        found,
        dataset=data,
        metrics=metrics,
        n_images=n_images,
        class_names=_class_names(data, None),
        began_official=not is_timm and (model.get("pretrained") is True or model.get("weights") == "official"),
    )


def _metrics(folder: Path, checkpoint: str, is_ema: bool, limit: int | None) -> tuple[dict[str, float], int | None]:
    """Results of these very weights, and of how many images; none if there are none."""
    evaluation, file = folder / RUN_EVALUATION, folder / "checkpoints" / checkpoint
    if evaluation.is_file() and file.is_file() and evaluation.stat().st_mtime_ns >= file.stat().st_mtime_ns:
        found = weights.read_json(evaluation)
        if Path(str(found.get("weights"))).name == checkpoint and found.get("ema") == is_ema:
            keys = ("acc1", "acc5", "loss")
            return {key: float(found[key]) for key in keys if found.get(key) is not None}, int(found["count"])
    if checkpoint != LAST or not (folder / RUN_SUMMARY).is_file():
        return {}, None
    logged = weights.read_json(folder / RUN_SUMMARY).get("metrics", {})
    logged = {key: value for key, value in logged.items() if value is not None}  # null: it wasn't finite
    part = "val_ema/" if is_ema else "val/"
    metrics = {key.removeprefix(part): float(value) for key, value in logged.items() if key.startswith(part)}
    if not is_ema:
        metrics |= {key: float(value) for key, value in logged.items() if key.startswith("explanation/")}
    return metrics, limit


def _of_export(found: Source) -> Source:
    config = found.config
    names = config.get("label_names")
    return replace(
        found,
        dataset=config.get("dataset"),
        metrics=config.get("metrics", {}),
        n_images=config.get("n_images"),
        class_names=None if names is None else tuple(names),
        licence=config.get("license"),
        is_official=config.get("is_official", False),
        began_official=config.get("began_official", False),
    )


def described_by(source: Source, name: str | None, options: Mapping[str, Any]) -> Source:
    """The source with what the user says about its model; another model than the known one has its own options.

    Results are of the model as it was trained: another function has none.
    """
    if name is not None and name != source.name:
        return replace(source, name=name, options=dict(options), metrics={}, n_images=None)
    merged = replace(source, options={**source.options, **options})
    if source.name is None or not weights.differences(source, merged.options, known_options(source.name)):
        return merged
    return replace(merged, metrics={}, n_images=None)


def known_options(name: str) -> Mapping[str, Any]:
    """The model's options with their defaults.

    Raises:
        ValueError: Unknown model.
    """
    signature = inspect.signature(timm_model) if name.startswith(TIMM) else model_signature(name)
    return {key: p.default for key, p in signature.parameters.items() if key not in ("name", "pretrained")}


def _class_names(dataset: str, num_classes: int | None) -> tuple[str, ...] | None:
    if dataset == "imagenet":
        from torchvision.models import ResNet18_Weights

        names = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        names = {"cifar10": _CIFAR10, "digits": tuple("0123456789")}.get(dataset, ())
    return names if names and num_classes in (None, len(names)) else None
