"""Run hash: identifies runs with equal results."""

import hashlib
import json
import os
from collections.abc import Mapping

__all__ = ["NOT_HASHED", "run_hash"]

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


#: Data sets with the same content wherever they are stored; all others are identified by their folder.
LOCATION_INDEPENDENT = ("bcos_train.dataset.Cifar10", "bcos_train.dataset.ImageNet")


def run_hash(config: Mapping[str, object]) -> str:
    """Return eight hexadecimal digits that depend on all settings that change results, and on nothing else.

    Batch norm statistics that are not synchronized depend on the number of images per device, that is, on the hardware;
    the hash covers the config only.
    """
    hashed = {key: _hashed_part(value, key) for key, value in config.items() if key not in NOT_HASHED}
    dataset = hashed.get("dataset")
    if isinstance(dataset, dict):
        root = dataset.pop("root", None)
        if root is not None and dataset["_target_"] not in LOCATION_INDEPENDENT:
            dataset["root"] = os.path.abspath(os.path.expanduser(root))
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def _hashed_part(value: object, path: str) -> object:
    """Copy a config value without the keys that are not hashed, and with all numbers as floats: 1 and 1.0 are equal."""
    if isinstance(value, Mapping):
        items = ((key, item, f"{path}.{key}") for key, item in value.items())
        return {key: _hashed_part(item, inner) for key, item, inner in items if inner not in NOT_HASHED}
    if isinstance(value, list):
        return [_hashed_part(item, f"{path}[]") for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
