"""Write and print an evaluation: ``explanations.json``, scores, figures and tables."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from bcos_train.evaluation.measuring import Results, measure
from bcos_train.evaluation.options import BOX_METRICS, ExplanationOptions
from bcos_train.evaluation.scoring import arrow, explain_grids
from bcos_train.evaluation.store import ScoreStore, fingerprint, replace_file
from bcos_train.evaluation.subject import Subject, grid_input, grid_pictures
from bcos_train.evaluation.summary import tables, to_json
from bcos_train.explanation import evaluating
from bcos_train.report import Panel, Row, box_plot, map_table, save_gallery, short_class_name
from bcos_train.runs.layout import EXPLANATION_SCORES, EXPLANATION_SUMMARY, EXPLANATIONS
from bcos_train.utils.console import make_console
from bcos_train.utils.files import write_json
from bcos_train.utils.progress import show_progress

__all__ = ["evaluate_explanations"]

#: Number of grids in the figure.
N_DRAWN = 4
#: Folder of stored scores, within that of the figures.
STORE = ".scores"
#: Ranges of metrics with a natural range.
LIMITS: Mapping[str, tuple[float, float]] = dict.fromkeys(("grid_pointing", "sparsity", *BOX_METRICS), (0, 1))


def evaluate_explanations(
    subject: Subject,
    options: ExplanationOptions,
    output: Path,
    *,
    title: str,
    origin: Mapping[str, object],
    identity: Mapping[str, object],
) -> Results:
    """Measure explanations, and write, draw and print the results.

    ``output`` receives ``explanations.json``, ``explanations.npz`` (all scores and the indices of their images) and, in
    ``explanations/``, a box plot per metric and a figure of some grids. Scores are stored in ``explanations/.scores``
    after each batch: the same command resumes after an interruption, and a command with more methods or metrics
    measures only the new ones.

    Args:
        subject: Model and images.
        options: Methods, metrics and their settings.
        output: Folder, created if it is missing.
        title: Name of the evaluated model, for headlines.
        origin: Model, weights and data set, for the JSON file.
        identity: Everything that scores depend on besides the weights and the options: the model, the data and their
            transforms. Scores of another identity are measured again.

    Returns:
        The measured scores.
    """
    folder = output / EXPLANATIONS
    folder.mkdir(parents=True, exist_ok=True)
    store = ScoreStore(folder / STORE, {"of": fingerprint({"weights": subject.model, "rest": dict(identity)})})
    with show_progress("explanations") as report:
        results = measure(subject, options, store, lambda what, done, total: report(done, total, what))
    summary = to_json(results, options)
    write_json(output / EXPLANATION_SUMMARY, {**origin, **summary})
    arrays = {
        f"{metric}/{method}": values.numpy()
        for metric, scores in results.scores.items()
        for method, values in scores.items()
    }
    if results.grids is not None:
        arrays["grids"] = results.grids.numpy()
    replace_file(output / EXPLANATION_SCORES, {**arrays, "images": np.array(results.images, dtype=np.int64)})
    figures = _draw_boxes(results, options, folder, title)
    if results.scores.get("grid_pointing"):
        figures.append(_draw_grids(subject, results, options, folder, title))
    console = make_console()
    parts, lines = tables(summary, options, title, console.width)
    for part in parts:
        console.print(part)
    lines.append(f"explanations: {output / EXPLANATION_SUMMARY}" + (f"; figures: {folder}" if figures else ""))
    console.print("\n".join(lines), soft_wrap=True)
    return results


def _draw_boxes(results: Results, options: ExplanationOptions, folder: Path, title: str) -> list[Path]:
    paths = []
    for metric, scores in results.scores.items():
        if not any(values.isfinite().any() for values in scores.values()):
            continue
        is_grid, n = metric == "grid_pointing", options.grid_pointing.n
        name = metric.replace("_", " ")
        figure = box_plot(
            scores,
            title,
            f"{name} ({n}x{n}) {arrow(metric)}" if is_grid else f"{name} {arrow(metric)}",
            uniform=1 / n**2 if is_grid else results.box_share if metric in BOX_METRICS else None,
            missing=[method for method in dict.fromkeys(options.methods) if method not in scores],
            limits=LIMITS.get(metric),
            logarithmic=metric == "completeness",
        )
        paths.append(folder / f"{metric}.png")
        save_gallery(paths[-1], figure)
    return paths


def _draw_grids(subject: Subject, results: Results, options: ExplanationOptions, folder: Path, title: str) -> Path:
    """Draw some grids with each method's map for one of their classes, smoothed as for the score."""
    assert results.grids is not None
    assert subject.predictions is not None
    settings, scores = options.grid_pointing, results.scores["grid_pointing"]
    methods = {name: method for name, method in options.make_methods().items() if name in scores}
    names, rows = subject.classifier.class_names, []
    with evaluating(subject.model):
        for g, grid in enumerate(results.grids[:N_DRAWN]):
            k = g % len(grid)
            picture = grid_pictures(subject, grid[None], settings)[0].permute(1, 2, 0)
            side = (picture.shape[1] // settings.n, picture.shape[0] // settings.n)
            box = (k % settings.n * side[0], k // settings.n * side[1], *side)
            x, target = grid_input(subject, grid[None], settings), subject.predictions.labels[grid[k : k + 1]][None]
            panels = [Panel(picture, box=box, n_cells=settings.n)]
            for name, method in methods.items():
                maps = explain_grids(subject.model, method, x, target, settings)
                smoothed = F.avg_pool2d(maps, settings.smooth, stride=1, padding=settings.smooth // 2)[0, 0]
                panels.append(Panel(smoothed, f"{float(scores[name][g, k]):.2f}", box, settings.n))
            rows.append(Row(short_class_name(names[int(target)]), panels))
    note = f", maps smoothed over {settings.smooth} px" if settings.smooth > 1 else ""
    headline = f"{title}: class of the framed cell, scores below{note}"
    path = folder / "grids.png"
    save_gallery(path, map_table(["grid", *methods], rows, headline))
    return path
