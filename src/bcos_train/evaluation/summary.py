"""Summarize measured scores as numbers and as tables."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import NotRequired, TypedDict

import torch
from rich.table import Table
from torch import Tensor

from bcos_train.evaluation.measuring import Results
from bcos_train.evaluation.options import BOX_METRICS, ExplanationOptions
from bcos_train.evaluation.scoring import HIGHER_IS_BETTER, arrow
from bcos_train.metric import bootstrap_interval
from bcos_train.utils.suggestions import join_words

__all__ = ["summarize", "tables", "to_json"]

#: Widths in characters of the first column and of each other column, with borders.
FIRST, CELL = 20, 25
PERCENTILES = (25, 50, 75, 100)


class ScoreSummary(TypedDict, total=False):
    """Statistics of a method's scores, see :func:`summarize`, or the reason why there are none."""

    mean: float | None
    low: float | None
    high: float | None
    p25: float | None
    p50: float | None
    p75: float | None
    p100: float | None
    n: int
    reason: str


class MetricSummary(TypedDict):
    """A metric: whether ``"larger"`` or ``"smaller"`` scores are better, and the summary for each method.

    The grid pointing game also has the score of a uniform explanation and the number of grids; metrics that need boxes
    the score of a uniform explanation and the number of pairs of an image and a class.
    """

    better: str
    methods: dict[str, ScoreSummary]
    uniform: NotRequired[float]
    n_grids: NotRequired[int]
    n_objects: NotRequired[int]


class AlignmentSummary(TypedDict):
    """Mean |cos| over all B-cos layers, and for each of them."""

    mean: float | None
    layers: dict[str, float | None]


class EvaluationSummary(TypedDict):
    """Content of ``explanations.json``."""

    metrics: dict[str, MetricSummary]
    n_images: int
    alignment: NotRequired[AlignmentSummary]
    settings: dict[str, object]


def summarize(scores: Tensor) -> ScoreSummary:
    """Return mean, 95 % bootstrap interval, percentiles and number of units.

    Args:
        scores: (units, ...), at least one unit; the scores of one unit are resampled together.

    Returns:
        ``mean``, ``low`` and ``high``, ``p25`` … ``p100``, and ``n``; None where the value is not finite.
    """
    values = scores.cpu().double()  # Apple's GPUs have no float64
    interval = bootstrap_interval(values)
    points = torch.quantile(values.flatten(), torch.tensor(PERCENTILES, dtype=values.dtype) / 100).tolist()
    mean, low, high, p25, p50, p75, p100 = map(_finite, (values.mean().item(), interval.low, interval.high, *points))
    return {"mean": mean, "low": low, "high": high, "p25": p25, "p50": p50, "p75": p75, "p100": p100, "n": len(values)}


def to_json(results: Results, options: ExplanationOptions) -> EvaluationSummary:
    """Return the content of ``explanations.json``, JSON-able."""
    metrics: dict[str, MetricSummary] = {}
    for metric, scores in results.scores.items():
        methods: dict[str, ScoreSummary] = {}
        for method in dict.fromkeys(options.methods):
            if method in scores:
                methods[method] = summarize(scores[method])
            elif reason := results.reasons.get(metric, {}).get(method):
                methods[method] = {"reason": reason}
        metrics[metric] = {"better": "larger" if HIGHER_IS_BETTER[metric] else "smaller", "methods": methods}
    if results.grids is not None and "grid_pointing" in metrics:
        metrics["grid_pointing"] |= {"uniform": 1 / options.grid_pointing.n**2, "n_grids": len(results.grids)}
    if results.box_share is not None:
        for name in BOX_METRICS:
            if name in metrics:
                metrics[name] |= {"uniform": results.box_share, "n_objects": results.objects}
    summary: EvaluationSummary = {"metrics": metrics, "n_images": len(results.images), "settings": asdict(options)}
    if results.alignment:
        layers = {layer: _finite(value) for layer, value in results.alignment.items()}
        summary["alignment"] = {"mean": _finite(sum(results.alignment.values()) / len(layers)), "layers": layers}
    return summary


def tables(
    summary: EvaluationSummary, options: ExplanationOptions, title: str, width: int
) -> tuple[list[Table], list[str]]:
    """Build tables with a row per method and a column per metric.

    Args:
        summary: From :func:`to_json`.
        options: Options of the evaluation.
        title: Title of the tables.
        width: Width of the terminal in characters; determines the number of tables.

    Returns:
        The tables, and lines to print below them.
    """
    metrics = summary["metrics"]
    methods = list(dict.fromkeys(options.methods))
    n_columns = max(1, (width - FIRST) // CELL)
    names = list(metrics)
    result = [
        _table({name: metrics[name] for name in names[i : i + n_columns]}, options, title)
        for i in range(0, len(names), n_columns)
    ]
    reasons: dict[str, list[str]] = {}
    for method in methods:
        for name, metric in metrics.items():
            if reason := metric["methods"].get(method, ScoreSummary()).get("reason"):
                reasons.setdefault(reason, []).append(f"{method}, {name.replace('_', ' ')}")
    lines = [f"{_places(places, len(metrics))}: {reason}" for reason, places in reasons.items()]
    units = [f"{summary['n_images']} images"] if any("uniform" not in metric for metric in metrics.values()) else []
    if "grid_pointing" in metrics:
        n_grids, requested = metrics["grid_pointing"]["n_grids"], options.grid_pointing.n_grids
        few = (
            f" (of {requested}: too few images are classified correctly and confidently enough)"
            if n_grids < requested
            else ""
        )
        units.insert(0, f"{n_grids} grids{few}")
    units += [f"{n} pairs of image and class" for n in {m["n_objects"] for m in metrics.values() if "n_objects" in m}]
    if units:
        lines.append(f"means over {join_words(units, 'and')}, 95 % bootstrap intervals in brackets")
    if "alignment" in summary:
        mean, layers = summary["alignment"]["mean"], summary["alignment"]["layers"]
        lines.append(f"alignment of the model: {_number(mean)} (mean |cos| of {len(layers)} layers)")
    return result, lines


def _table(metrics: Mapping[str, MetricSummary], options: ExplanationOptions, title: str) -> Table:
    result = Table(title=title)
    result.add_column("method", vertical="bottom")
    for name, metric in metrics.items():
        head = f"{name.replace('_', ' ')} {arrow(name)}"
        if "uniform" in metric:
            cells = f"{options.grid_pointing.n}x{options.grid_pointing.n}, " if "n_grids" in metric else ""
            head += f"\n{cells}uniform {metric['uniform']:.3f}"
        result.add_column(head, justify="right", vertical="bottom")
    for method in dict.fromkeys(options.methods):
        result.add_row(method, *(_cell(metric["methods"].get(method)) for metric in metrics.values()))
    return result


def _cell(summary: ScoreSummary | None) -> str:
    if summary is None or "mean" not in summary:
        return "–"
    if summary["mean"] is None:
        return "not finite"
    return f"{_number(summary['mean'])} [{_number(summary['low'])}, {_number(summary['high'])}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


def _places(places: list[str], n_metrics: int) -> str:
    """Join places; methods with the same reason for all metrics are listed by name only."""
    methods = dict.fromkeys(place.partition(", ")[0] for place in places)
    whole = all(sum(place.startswith(f"{method}, ") for place in places) == n_metrics for method in methods)
    return ", ".join(methods) if whole else "; ".join(places)
