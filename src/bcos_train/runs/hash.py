"""The run hash: which runs are the same run."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["NOT_HASHED", "run_hash"]

#: Config keys that change where, how fast or how visibly a run goes, but not its results.
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


#: Data sets with the same content wherever they are stored; any other is identified by its folder.
LOCATION_INDEPENDENT = ("bcos_train.dataset.Cifar10", "bcos_train.dataset.ImageNet")


def run_hash(config: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that depend on everything that changes results, and on nothing else.

    Without synchronized statistics, batch norms depend on how many images a device sees, so on the hardware; the hash
    covers what was asked for.
    """
    hashed = _numbers_alike(_without(config, NOT_HASHED))
    dataset = hashed.get("dataset", {})
    root = dataset.pop("root", None)
    if root is not None and dataset["_target_"] not in LOCATION_INDEPENDENT:
        dataset["root"] = os.path.abspath(os.path.expanduser(root))
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]


def _numbers_alike(value: Any) -> Any:
    """``1`` and ``1.0`` are one setting."""
    if isinstance(value, Mapping):
        return {key: _numbers_alike(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_alike(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _without(config: Mapping[str, Any], paths: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    rest = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path not in paths:
            rest[key] = _without(value, paths, f"{path}.") if isinstance(value, Mapping) else value
    return rest
