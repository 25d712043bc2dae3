"""Results of a run or an evaluation: files and a summary on the terminal."""

import platform
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import evaluating, is_explainable
from bcos_train.report import save_gallery
from bcos_train.runs.folder import RunFolder
from bcos_train.runs.layout import (
    EMA_WEIGHTS,
    EVALUATION,
    EXPLANATIONS,
    GALLERY,
    METRICS,
    SUMMARY,
    WEIGHTS,
    salvage_metrics,
)
from bcos_train.training.callbacks.checkpoint import BestCheckpoint, Checkpointer
from bcos_train.training.callbacks.ema import EmaCallback
from bcos_train.training.callbacks.explanations import Origin, draw_gallery
from bcos_train.training.callbacks.progress import duration
from bcos_train.training.module import Classifier
from bcos_train.training.side_matters import only_warn
from bcos_train.utils.console import make_console
from bcos_train.utils.files import file_sha256, write_json
from bcos_train.weights.files import save_weights

#: Scores of the table of an evaluation, besides the loss: key, and name in the table.
_SCORES = {
    "acc1": "top-1 [%]",
    "acc5": "top-5 [%]",
    "worst_group_acc1": "worst group [%]",
    "f1": "micro-F1 [%]",
    "map": "mAP [%]",
}
#: Number of images in the gallery of an evaluation.
GALLERY_IMAGES = 12


def finish(
    trainer: pl.Trainer, module: Classifier, folder: RunFolder, model_name: str, console: Console, seconds: float
) -> None:
    """Write the weights and ``summary.json``, and print a short summary."""
    names = [str(name) for name in module.data.class_names]
    save_weights(module.model, folder.path / WEIGHTS, names)
    best: list[BestCheckpoint] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EmaCallback):
            save_weights(callback.model, folder.path / EMA_WEIGHTS, names)
        if isinstance(callback, Checkpointer):
            best = callback.best
    # Read from the file: this process may have resumed after the last epoch.
    path = folder.path / METRICS
    _, rows, problem = salvage_metrics(path) if path.exists() else ([], [], None)
    if problem is not None:
        console.print(f"skipped: {path} is damaged: {problem}", style="yellow", soft_wrap=True)
    metrics = {key: value for row in rows for key, value in row.items() if key not in ("step", "epoch")}
    galleries = sorted((folder.path / EXPLANATIONS).glob("*.png"))
    summary = {
        "name": folder.name,
        "model": model_name,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "metrics": metrics,
        "best": best,
        "seconds_since_start_or_resume": round(seconds, 1),
        "gallery": str(galleries[-1].relative_to(folder.path)) if galleries else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__},
        "class_names": names,
        "sha256": {name: file_sha256(path) for name in (WEIGHTS, EMA_WEIGHTS) if (path := folder.path / name).exists()},
    }
    # Written last: this file marks the run as finished.
    write_json(folder.path / SUMMARY, summary)
    lines = [f"done in {duration(seconds)}"]
    if "val/acc1" in metrics:
        lines[0] += f": validation accuracy {metrics['val/acc1']:.2f} %"
    elif "val/f1" in metrics:
        lines[0] += f": validation F1 {metrics['val/f1']:.2f} %"
    if best:
        lines.append(f"best: {best[0]['score']:.2f} after epoch {best[0]['epoch']}")
    lines.append(f"folder: {folder.path}")
    if galleries:
        lines.append(f"gallery: {galleries[-1]}")
    console.print("\n".join(lines), soft_wrap=True)


def report_evaluation(module: Classifier, data: DataModule, origin: Origin, output: Path, seconds: float) -> None:
    """Print the results of a validation as a table, and write ``evaluation.json`` and a gallery.

    Args:
        origin: Evaluated weights, written to the file and printed with the table.
        output: Folder, created if it doesn't exist.
    """
    output.mkdir(parents=True, exist_ok=True)
    result = module.val_result
    title = f"{origin['model']} on {data.dataset.name}"
    content: dict[str, object] = {
        **origin,
        "dataset": data.dataset.name,
        **result,
        **{
            f"correct{k}": round(result[f"acc{k}"] * result["count"] / 100) for k in (1, 5) if not module.is_multi_label
        },
        "seconds": round(seconds, 2),
    }
    if is_explainable(module.model):
        samples = data.fixed_val_samples(GALLERY_IMAGES)
        accuracy = None if module.is_multi_label else result["acc1"] / 100
        with only_warn("gallery"):
            with evaluating(module.model):
                figure = draw_gallery(module, data, samples, title=title, accuracy=accuracy)
            save_gallery(output / GALLERY, figure)
            content["gallery"] = GALLERY
    write_json(output / EVALUATION, content)
    table = Table(title=title)
    cells = {name: f"{result[key]:.3f}" for key, name in _SCORES.items() if key in result}
    cells |= {"loss": f"{result['loss']:.5f}", "images": f"{int(result['count']):,}", "seconds": f"{seconds:.1f}"}
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    console = make_console()
    console.print(table)
    if skipped := result.get("skipped"):
        console.print(f"{int(skipped):,} images can't be read, the scores are those of the others", style="yellow")
    console.print(f"weights: {origin['weights']}{' (averaged)' if origin['ema'] else ''}", soft_wrap=True)
    console.print(f"results: {output}", soft_wrap=True)
