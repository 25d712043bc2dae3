"""Numbers and a table of what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bcos_train.evaluation.measuring import Results
from bcos_train.evaluation.options import ExplanationOptions
from bcos_train.evaluation.scoring import BETTER
from bcos_train.metric import bootstrap_interval

__all__ = ["describe", "summarize", "tables"]

#: Characters of the first column and of each of the others, with their borders.
FIRST, CELL = 20, 25
PERCENTILES = (25, 50, 75, 100)


def summarize(scores: Tensor) -> dict[str, float | int | None]:
    """``mean`` with its 95 % bootstrap interval ``low`` and ``high``, percentiles ``p25`` … ``p100``, and ``n`` units.

    Args:
        scores: (units, ...), at least one; what belongs to one unit is resampled together.

    Returns:
        JSON-able: None stands for NaN, which a method has that gives one.
    """
    values = scores.double()
    interval = bootstrap_interval(values)
    points = torch.quantile(values.flatten(), torch.tensor(PERCENTILES, dtype=values.dtype) / 100).tolist()
    numbers = {"mean": values.mean().item(), "low": interval.low, "high": interval.high}
    numbers |= {f"p{percentile}": point for percentile, point in zip(PERCENTILES, points, strict=True)}
    return {**{key: _finite(value) for key, value in numbers.items()}, "n": len(values)}


def describe(results: Results, options: ExplanationOptions) -> dict[str, Any]:
    """All of it, JSON-able: the content of ``explanations.json``."""
    metrics: dict[str, Any] = {}
    for metric, scores in results.scores.items():
        methods: dict[str, Any] = {}
        for method in dict.fromkeys(options.methods):
            if method in scores:
                methods[method] = summarize(scores[method])
            elif reason := results.reasons.get(metric, {}).get(method):
                methods[method] = {"reason": reason}
        metrics[metric] = {"better": "larger" if BETTER[metric] == "↑" else "smaller", "methods": methods}
    if results.grids is not None and "grid_pointing" in metrics:
        metrics["grid_pointing"] |= {"uniform": 1 / options.grid_pointing.n**2, "n_grids": len(results.grids)}
    content: dict[str, Any] = {"metrics": metrics, "n_images": len(results.images)}
    if results.alignment:
        layers = {layer: _finite(value) for layer, value in results.alignment.items()}
        mean = _finite(sum(results.alignment.values()) / len(layers))
        content["alignment"] = {"mean": mean, "layers": layers}
    return {**content, "settings": asdict(options)}


def tables(content: Mapping[str, Any], title: str, width: int) -> tuple[list[Table], list[str]]:
    """Methods down, metrics across, in as many tables as the width asks for, and lines to print below.

    Args:
        content: from :func:`describe`.
        title: above the tables.
        width: of the terminal, in characters.
    """
    metrics: Mapping[str, Any] = content["metrics"]
    methods = list(dict.fromkeys(content["settings"]["methods"]))
    at_once = max(1, (width - FIRST) // CELL)
    names = list(metrics)
    found = [
        _table({name: metrics[name] for name in names[i : i + at_once]}, methods, content, title)
        for i in range(0, len(names), at_once)
    ]
    reasons: dict[str, list[str]] = {}
    for method in methods:
        for name, metric in metrics.items():
            if reason := metric["methods"].get(method, {}).get("reason"):
                reasons.setdefault(reason, []).append(f"{method}, {name.replace('_', ' ')}")
    lines = [f"{_places(places, len(metrics))}: {reason}" for reason, places in reasons.items()]
    units = [f"{content['n_images']} images"] if any("uniform" not in metric for metric in metrics.values()) else []
    if "grid_pointing" in metrics:
        n_grids, wanted = metrics["grid_pointing"]["n_grids"], content["settings"]["grid_pointing"]["n_grids"]
        few = f" (of {wanted}: too few images are classified correctly and surely enough)" if n_grids < wanted else ""
        units.insert(0, f"{n_grids} grids{few}")
    if units:
        lines.append(f"means over {' and '.join(units)}, in brackets their 95 % intervals (bootstrap)")
    if "alignment" in content:
        mean, layers = content["alignment"]["mean"], content["alignment"]["layers"]
        lines.append(f"alignment of the model: {_number(mean)} (mean |cos| of {len(layers)} layers)")
    return found, lines


def _table(metrics: Mapping[str, Any], methods: Sequence[str], content: Mapping[str, Any], title: str) -> Table:
    result = Table(title=title)
    result.add_column("method", vertical="bottom")
    for name, metric in metrics.items():
        head = f"{name.replace('_', ' ')} {BETTER[name]}"
        if "uniform" in metric:
            n = content["settings"]["grid_pointing"]["n"]
            head += f"\n{n}x{n}, uniform {metric['uniform']:.3f}"
        result.add_column(head, justify="right", vertical="bottom")
    for method in methods:
        result.add_row(method, *(_cell(metric["methods"].get(method, {})) for metric in metrics.values()))
    return result


def _cell(found: Mapping[str, Any]) -> str:
    if "mean" not in found:
        return "–"
    if found["mean"] is None:
        return "not finite"
    return f"{_number(found['mean'])} \\[{_number(found['low'])}, {_number(found['high'])}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"


def _places(places: list[str], n_metrics: int) -> str:
    """Methods alone where all of their metrics have the same reason."""
    methods = dict.fromkeys(place.partition(", ")[0] for place in places)
    whole = all(sum(place.startswith(f"{method}, ") for place in places) == n_metrics for method in methods)
    return ", ".join(methods) if whole else "; ".join(places)
