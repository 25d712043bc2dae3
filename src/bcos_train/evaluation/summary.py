"""Summarize measured scores as numbers and as tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bcos_train.evaluation.measuring import Results
from bcos_train.evaluation.options import ExplanationOptions
from bcos_train.evaluation.scoring import HIGHER_IS_BETTER, arrow
from bcos_train.metric import bootstrap_interval

__all__ = ["summarize", "tables", "to_json"]

#: Widths in characters of the first column and of each other column, with borders.
FIRST, CELL = 20, 25
PERCENTILES = (25, 50, 75, 100)


def summarize(scores: Tensor) -> dict[str, float | int | None]:
    """Return mean, 95 % bootstrap interval, percentiles and number of units.

    Args:
        scores: (units, ...), at least one unit; the scores of one unit are resampled together.

    Returns:
        ``mean``, ``low`` and ``high``, ``p25`` … ``p100``, and ``n``; None where the value is not finite.
    """
    values = scores.double()
    interval = bootstrap_interval(values)
    points = torch.quantile(values.flatten(), torch.tensor(PERCENTILES, dtype=values.dtype) / 100).tolist()
    numbers = {"mean": values.mean().item(), "low": interval.low, "high": interval.high}
    numbers |= {f"p{percentile}": point for percentile, point in zip(PERCENTILES, points, strict=True)}
    return {**{key: _finite(value) for key, value in numbers.items()}, "n": len(values)}


def to_json(results: Results, options: ExplanationOptions) -> dict[str, Any]:
    """Return the content of ``explanations.json``, JSON-able."""
    metrics: dict[str, Any] = {}
    for metric, scores in results.scores.items():
        methods: dict[str, Any] = {}
        for method in dict.fromkeys(options.methods):
            if method in scores:
                methods[method] = summarize(scores[method])
            elif reason := results.reasons.get(metric, {}).get(method):
                methods[method] = {"reason": reason}
        metrics[metric] = {"better": "larger" if HIGHER_IS_BETTER[metric] else "smaller", "methods": methods}
    if results.grids is not None and "grid_pointing" in metrics:
        metrics["grid_pointing"] |= {"uniform": 1 / options.grid_pointing.n**2, "n_grids": len(results.grids)}
    content: dict[str, Any] = {"metrics": metrics, "n_images": len(results.images)}
    if results.alignment:
        layers = {layer: _finite(value) for layer, value in results.alignment.items()}
        mean = _finite(sum(results.alignment.values()) / len(layers))
        content["alignment"] = {"mean": mean, "layers": layers}
    return {**content, "settings": asdict(options)}


def tables(content: Mapping[str, Any], title: str, width: int) -> tuple[list[Table], list[str]]:
    """Build tables with a row per method and a column per metric.

    Args:
        content: From :func:`to_json`.
        title: Title of the tables.
        width: Width of the terminal in characters; determines the number of tables.

    Returns:
        The tables, and lines to print below them.
    """
    metrics: Mapping[str, Any] = content["metrics"]
    methods = list(dict.fromkeys(content["settings"]["methods"]))
    n_columns = max(1, (width - FIRST) // CELL)
    names = list(metrics)
    result = [
        _table({name: metrics[name] for name in names[i : i + n_columns]}, methods, content, title)
        for i in range(0, len(names), n_columns)
    ]
    reasons: dict[str, list[str]] = {}
    for method in methods:
        for name, metric in metrics.items():
            if reason := metric["methods"].get(method, {}).get("reason"):
                reasons.setdefault(reason, []).append(f"{method}, {name.replace('_', ' ')}")
    lines = [f"{_places(places, len(metrics))}: {reason}" for reason, places in reasons.items()]
    units = [f"{content['n_images']} images"] if any("uniform" not in metric for metric in metrics.values()) else []
    if "grid_pointing" in metrics:
        n_grids, requested = metrics["grid_pointing"]["n_grids"], content["settings"]["grid_pointing"]["n_grids"]
        few = (
            f" (of {requested}: too few images are classified correctly and confidently enough)"
            if n_grids < requested
            else ""
        )
        units.insert(0, f"{n_grids} grids{few}")
    if units:
        lines.append(f"means over {' and '.join(units)}, 95 % bootstrap intervals in brackets")
    if "alignment" in content:
        mean, layers = content["alignment"]["mean"], content["alignment"]["layers"]
        lines.append(f"alignment of the model: {_number(mean)} (mean |cos| of {len(layers)} layers)")
    return result, lines


def _table(metrics: Mapping[str, Any], methods: Sequence[str], content: Mapping[str, Any], title: str) -> Table:
    result = Table(title=title)
    result.add_column("method", vertical="bottom")
    for name, metric in metrics.items():
        head = f"{name.replace('_', ' ')} {arrow(name)}"
        if "uniform" in metric:
            n = content["settings"]["grid_pointing"]["n"]
            head += f"\n{n}x{n}, uniform {metric['uniform']:.3f}"
        result.add_column(head, justify="right", vertical="bottom")
    for method in methods:
        result.add_row(method, *(_cell(metric["methods"].get(method, {})) for metric in metrics.values()))
    return result


def _cell(summary: Mapping[str, Any]) -> str:
    if "mean" not in summary:
        return "–"
    if summary["mean"] is None:
        return "not finite"
    return f"{_number(summary['mean'])} \\[{_number(summary['low'])}, {_number(summary['high'])}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


def _places(places: list[str], n_metrics: int) -> str:
    """Join places; a method whose metrics all have the same reason is listed by its name alone."""
    methods = dict.fromkeys(place.partition(", ")[0] for place in places)
    whole = all(sum(place.startswith(f"{method}, ") for place in places) == n_metrics for method in methods)
    return ", ".join(methods) if whole else "; ".join(places)
