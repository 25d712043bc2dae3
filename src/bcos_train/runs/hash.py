"""Run hash: identifies runs with equal results."""

import hashlib
import json
import os
from collections.abc import Mapping

__all__ = ["NOT_HASHED", "PATHS", "run_hash", "with_absolute_paths"]

#: Config keys that affect where, how fast or how verbosely a run executes, but not its results.
NOT_HASHED = (
    "name",
    "runs",
    "resume",
    "plugins",
    "logger",
    "checkpointing",
    "explanation",
    "num_workers",
    "dataset.download",
    "dataset.cache",
    "dataset.max_skipped",
    "model.backend",
    "model.grad_checkpointing",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_batch_per_device",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.log_every_n_steps",
    "trainer.progress",
)

#: Config keys whose value is the path of an input. ``runs`` is not one of them: it is used once, to find the run folder.
PATHS = (
    "dataset.root",
    "dataset.shards",
    "model.weights",
    "distillation.teacher",
    "distillation.teacher_weights",
    "distillation.frozen",
)
#: Values of these keys that are names.
_NOT_PATHS = ("official", "random")
#: Data sets with the same content wherever they are stored; all others are identified by their folder.
LOCATION_INDEPENDENT = ("bcos_train.dataset.Cifar10", "bcos_train.dataset.ImageNet")


def run_hash(config: Mapping[str, object]) -> str:
    """Return eight hexadecimal digits that depend on all settings that change results, and on nothing else.

    Batch norm statistics that are not synchronized depend on the number of images per device, that is, on the hardware;
    the hash covers the config only.
    """
    paths = with_absolute_paths(config)
    hashed = {key: _hashed_part(value, key) for key, value in paths.items() if key not in NOT_HASHED}
    for key in ("drop_last", "distillation", "guidance"):  # keys of later versions
        if not hashed.get(key):
            hashed.pop(key, None)
    dataset = hashed.get("dataset")
    if isinstance(dataset, dict):
        if dataset.get("root") is None or dataset["_target_"] in LOCATION_INDEPENDENT:
            dataset.pop("root", None)
        for key, unset in (("shots", None), ("val_per_class", None), ("shards", None), ("storage", "folder")):
            if dataset.get(key) == unset:
                dataset.pop(key, None)
        if not {"shots", "val_per_class"} & dataset.keys():
            dataset.pop("split_seed", None)  # nothing is drawn
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def with_absolute_paths(config: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a config with all paths of inputs absolute, so that it means the same in any folder."""
    result = dict(config)
    for group, key in (path.split(".") for path in PATHS):
        node = result.get(group)
        if not isinstance(node, Mapping):
            continue
        if isinstance(parts := node.get(key), Mapping):  # the shards of each part
            result[group] = {**node, key: {part: _absolute(path) for part, path in parts.items()}}
        if not isinstance(path := node.get(key), str) or path in _NOT_PATHS:
            continue
        path = os.path.expanduser(path)
        if key != "teacher" or os.path.isfile(path) or (os.sep in path and os.path.isdir(path)):  # else a model's name
            result[group] = {**node, key: os.path.abspath(path)}
    return result


def _absolute(path: object) -> object:
    return os.path.abspath(os.path.expanduser(path)) if isinstance(path, str) else path


def _hashed_part(value: object, path: str) -> object:
    """Copy a config value without the keys that are not hashed, and with all numbers as floats: 1 and 1.0 are equal."""
    if isinstance(value, Mapping):
        items = ((key, item, f"{path}.{key}") for key, item in value.items())
        return {str(key): _hashed_part(item, inner) for key, item, inner in items if inner not in NOT_HASHED}
    if isinstance(value, list):
        return [_hashed_part(item, f"{path}[]") for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
