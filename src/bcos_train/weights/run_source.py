"""Read what a run folder records about its weights: config, data set, class names and validation results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bcos_train.model.registry import OFFICIAL
from bcos_train.runs.layout import CHECKPOINTS, EVALUATION, LAST, RUN_CONFIG, SUMMARY
from bcos_train.weights.files import read_json
from bcos_train.weights.model_options import TIMM, model_of_config

__all__ = ["activation_of", "class_names_of", "dataset_of", "read_results", "read_run_config", "starts_from_official"]

_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


def read_run_config(folder: Path) -> dict[str, Any] | None:
    """Read a run's config; ``None`` if the file belongs to another program.

    Raises:
        ValueError: The file can't be read or names no model.
    """
    import yaml

    path = folder / RUN_CONFIG
    try:
        config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        if "model" not in config:
            return None
        model_of_config(config["model"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not the config of a run ({' '.join(repr(error).split())})") from error
    return config


def dataset_of(config: Mapping[str, object]) -> str | None:
    """Return the data set's name, that of its class in lower case; ``None`` if the config has none."""
    dataset = config.get("dataset")
    target = dataset.get("_target_") if isinstance(dataset, Mapping) else None
    return None if target is None else str(target).rpartition(".")[2].lower()


def activation_of(config: Mapping[str, object]) -> str | None:
    """Return the activation that the loss in a run's config implies: ``"sigmoid"``, ``"softmax"`` or ``None``."""
    loss = config.get("loss")
    target = str(loss.get("_target_")).rpartition(".")[2] if isinstance(loss, Mapping) else ""
    return "softmax" if target == "CrossEntropy" else "sigmoid" if target.endswith("BinaryCrossEntropy") else None


def class_names_of(dataset: str) -> tuple[str, ...] | None:
    """Return the class names of a data set whose classes are fixed; ``None`` for any other."""
    if dataset == "imagenet":
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return {"cifar10": _CIFAR10_CLASSES, "digits": _DIGITS}.get(dataset)


def starts_from_official(model: Mapping[str, object]) -> bool:
    """True if a config's ``model`` node starts training from official weights."""
    name, _ = model_of_config(model)
    return not name.startswith(TIMM) and (model.get("pretrained") is True or model.get("weights") == OFFICIAL)


def read_results(
    folder: Path, checkpoint: str, is_ema: bool, limit_val: int | None
) -> tuple[dict[str, float], int | None]:
    """Read the validation results of exactly these weights.

    Args:
        folder: The run folder.
        checkpoint: Name of the checkpoint with these weights; the last one has the run's final weights.
        is_ema: True for the averaged weights.
        limit_val: Number of validation images during training; ``None``: all.

    Returns:
        Metrics, empty if there are none, and the number of images behind them (``None``: all).

    Raises:
        ValueError: A results file can't be read.
    """
    evaluation, file = folder / EVALUATION, folder / CHECKPOINTS / checkpoint
    # An evaluation older than the checkpoint belongs to an earlier file with this name.
    if evaluation.is_file() and file.is_file() and evaluation.stat().st_mtime_ns >= file.stat().st_mtime_ns:
        result = read_json(evaluation)
        if Path(str(result.get("weights"))).name == checkpoint and result.get("ema") == is_ema:
            keys = ("acc1", "acc5", "f1", "map", "worst_group_acc1", "loss")
            return {key: float(result[key]) for key in keys if result.get(key) is not None}, int(result["count"])
    if checkpoint != LAST or not (folder / SUMMARY).is_file():
        return {}, None
    logged = read_json(folder / SUMMARY).get("metrics", {})
    logged = {key: value for key, value in logged.items() if value is not None}  # null: not finite
    prefix = "val_ema/" if is_ema else "val/"
    metrics = {key.removeprefix(prefix): float(value) for key, value in logged.items() if key.startswith(prefix)}
    if not is_ema:
        metrics |= {key: float(value) for key, value in logged.items() if key.startswith("explanation/")}
    return metrics, limit_val
