"""Files of a run folder, and of an exported folder: every name once, and how to read what a run logged and kept.

::

    runs/<dataset>/<model>/<name>-<hash>/
        config.yaml             the config, as composed
        metrics.csv             what was logged, a row per step
        checkpoints/            last.ckpt, previous.ckpt, epoch-….ckpt with a .sha256 each, best.json
        explanations/           a gallery per measurement
        model.safetensors       final weights, model_ema.safetensors their average
        summary.json            results; written last: the run has finished
        evaluation.json, explanations.json, gallery.png        written by evaluate.py
"""

import csv
from pathlib import Path
from typing import Any

__all__ = [
    "BEST",
    "CARD",
    "CHECKPOINTS",
    "CHECKPOINT_SUFFIX",
    "EMA_WEIGHTS",
    "EVALUATION",
    "EXPLANATIONS",
    "EXPORT_CONFIG",
    "GALLERY",
    "LAST",
    "LIBRARY",
    "LOCK",
    "METRICS",
    "PREVIOUS",
    "RUN_CONFIG",
    "SUMMARY",
    "WEIGHTS",
    "checkpoints_by_epoch",
    "read_metrics",
]

RUN_CONFIG, METRICS, LOCK = "config.yaml", "metrics.csv", ".lock"
#: The folder of checkpoints; its newest one, which ends up with the final weights, the one before, and the best ones.
CHECKPOINTS, LAST, PREVIOUS, BEST = "checkpoints", "last.ckpt", "previous.ckpt", "best.json"
CHECKPOINT_SUFFIX = ".ckpt"
#: Weights at the top of a run folder or an exported folder.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"
#: Results of a run: written when training ends, and by an evaluation.
SUMMARY, EVALUATION, EXPLANATIONS, GALLERY = "summary.json", "evaluation.json", "explanations", "gallery.png"
#: An exported folder's config and model card, and the ``library_name`` in that config.
EXPORT_CONFIG, CARD, LIBRARY = "config.json", "README.md", "bcos-train"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.csv``, numbers as numbers, empty cells left out."""
    with path.open(newline="") as file:
        return [{key: _number(text) for key, text in row.items() if text} for row in csv.DictReader(file)]


def checkpoints_by_epoch(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run folder that were kept for their score, by the epoch that they ended, in order."""
    paths = sorted((run / CHECKPOINTS).glob(f"epoch-*{CHECKPOINT_SUFFIX}"))
    return {int(path.name.split("-")[1]): path for path in paths if path.name.split("-")[1].isdigit()}


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)
