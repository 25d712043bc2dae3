"""File names in run folders and exported folders, each defined once, and readers for logs and checkpoints.

::

    runs/<dataset>/<model>/<name>-<hash>/
        config.yaml             the composed config
        metrics.csv             logged metrics, a row per step
        checkpoints/            last.ckpt, previous.ckpt and epoch-….ckpt with a .sha256 each, best.json
        explanations/           a gallery per measurement; from evaluate.py, figures of the scores
        model.safetensors       final weights; model_ema.safetensors: averaged weights
        summary.json            results; written last, so it marks a finished run
        evaluation.json, explanations.json, explanations.npz, gallery.png        from evaluate.py
"""

import csv
import re
from pathlib import Path

__all__ = [
    "BEST",
    "CARD",
    "CHECKPOINTS",
    "CHECKPOINT_SUFFIX",
    "DIGEST_SUFFIX",
    "EMA_WEIGHTS",
    "EVALUATION",
    "EXPLANATIONS",
    "EXPLANATION_SCORES",
    "EXPLANATION_SUMMARY",
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
    "WEIGHTS_SUFFIX",
    "check_checkpoint_name",
    "checkpoints_by_epoch",
    "read_metrics",
    "salvage_metrics",
]

RUN_CONFIG, METRICS, LOCK = "config.yaml", "metrics.csv", ".lock"
CHECKPOINT_SUFFIX, DIGEST_SUFFIX, WEIGHTS_SUFFIX = ".ckpt", ".sha256", ".safetensors"
#: Checkpoint folder; newest checkpoint (in a finished run, the final weights), the one before, list of the best ones.
CHECKPOINTS, LAST, PREVIOUS, BEST = "checkpoints", "last.ckpt", "previous.ckpt", "best.json"
#: Weights at the top of a run folder or an exported folder.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"
#: Results, written at the end of training and by an evaluation.
SUMMARY, EVALUATION, GALLERY = "summary.json", "evaluation.json", "gallery.png"
#: Explanation measurements: folder of figures, summary, and all scores.
EXPLANATIONS, EXPLANATION_SUMMARY, EXPLANATION_SCORES = "explanations", "explanations.json", "explanations.npz"
#: An exported folder's config and model card, and the ``library_name`` in that config.
EXPORT_CONFIG, CARD, LIBRARY = "config.json", "README.md", "bcos-train"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.csv`` without their empty cells.

    Raises:
        ValueError: The file is damaged.
    """
    _, rows, problem = salvage_metrics(path)
    if problem is not None:
        raise ValueError(f"{path} is damaged: {problem}")
    return rows


def salvage_metrics(path: Path) -> tuple[list[str], list[dict[str, float]], str | None]:
    """Return the columns and the readable rows of a ``metrics.csv``, and what is wrong with the file, if anything."""
    if path.is_dir() or path.is_symlink():
        return [], [], "it is a folder" if path.is_dir() else "it is a link"
    lines = path.read_bytes().decode(errors="replace").splitlines()
    try:
        columns = next(csv.reader(lines[:1]), [])
    except csv.Error:  # a name that is too long
        columns = []
    if "step" not in columns or len(set(columns)) < len(columns):
        return [], [], "its first line doesn't name the column step and others" if lines else "it is empty"
    rows: list[dict[str, float]] = []
    damaged = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            cells = next(csv.reader([line], strict=True), [])
            row = {key: _number(text) for key, text in zip(columns, cells, strict=True) if text}
            if row["step"] < (rows[-1]["step"] if rows else 0):
                raise ValueError("steps are in order")
        except (ValueError, KeyError, csv.Error):
            damaged.append(number)
        else:
            rows.append(row)
    return columns, rows, f"line {damaged[0]} can't be read, {len(damaged)} in all" if damaged else None


def checkpoints_by_epoch(run: Path) -> dict[int, Path]:
    """Return the best checkpoints of a run folder by their epoch, in order."""
    paths = sorted((run / CHECKPOINTS).glob(f"epoch-*{CHECKPOINT_SUFFIX}"))
    return {int(path.name.split("-")[1]): path for path in paths if path.name.split("-")[1].isdigit()}


def check_checkpoint_name(name: object) -> str:
    """Return the name of a best checkpoint as read from a file, which may be anything.

    Raises:
        ValueError: It isn't a bare name of the form ``epoch-0001-….ckpt``.
    """
    if isinstance(name, str) and re.fullmatch(r"epoch-\d+-[^/\\\0]*" + re.escape(CHECKPOINT_SUFFIX), name):
        return name
    raise ValueError(f"{name!r} is not the name of a checkpoint of this run")


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)
