"""Every metric of every method, batch by batch: the same images and grids for all methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bcos_train.evaluation.options import ExplanationOptions
from bcos_train.evaluation.scoring import Case, image_scores, score_grids
from bcos_train.evaluation.store import ScoreStore
from bcos_train.evaluation.subject import Subject, draw_grids, grid_input, why_not_grids
from bcos_train.explanation import evaluating, without_tf32
from bcos_train.explanation.method import CannotExplain, Method
from bcos_train.metric import cosine_alignment

__all__ = ["Results", "measure"]

#: ``on_step(what, done, total)``: called before each batch of each method with the number of units (images or grids,
#: counted for each method) that are done.
OnStep = Callable[[str, int, int], None]


@dataclass
class Results:
    """What was measured.

    Attributes:
        scores: metric -> method -> scores (units, ...): (G, K) for grids, (N,) for images; in order of the units.
        reasons: metric -> method -> why there are no scores.
        alignment: Mean |cos| of each B-cos layer, empty if it wasn't asked for or there are none.
        grids: (G, K) indices in the validation set, in reading order of the cells; None if not asked for.
        images: Indices of the images of the other metrics.
    """

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    alignment: dict[str, float] = field(default_factory=dict)
    grids: Tensor | None = None
    images: list[int] = field(default_factory=list)


#: Scores of units start ... stop-1 for some methods and metrics: (method, metrics) pairs -> metric -> scores or reason.
_Compute = Callable[[int, int], Callable[[str, list[str]], dict[str, Tensor | str]]]


@dataclass
class _Pass:
    """Metrics that share their units."""

    metrics: list[str]
    n_units: int
    batch_size: int
    identity: Mapping[str, Any]
    #: (start, stop) -> a function (method, metrics) -> metric -> scores of these units, or why there are none.
    batch: _Compute


def measure(
    subject: Subject,
    options: ExplanationOptions,
    store: ScoreStore | None = None,
    on_step: OnStep = lambda what, done, total: None,
) -> Results:
    """Measure what the options ask for.

    The model is evaluated in evaluation mode and left as it was. Scores that the store has are not measured again.
    """
    store = ScoreStore(None, {}) if store is None else store
    methods = options.make_methods()
    results = Results(images=list(subject.images))
    passes = []
    with evaluating(subject.model), without_tf32():
        if "grid_pointing" in options.metrics and subject.predictions is not None:
            results.grids = draw_grids(subject.predictions, options.grid_pointing)
            if (reason := why_not_grids(subject, results.grids, options.grid_pointing)) is None:
                passes.append(_grid_pass(subject, results.grids, options, methods))
            else:
                results.scores["grid_pointing"] = {}
                results.reasons["grid_pointing"] = dict.fromkeys(methods, reason)
        if metrics := [name for name in options.metrics if name not in ("grid_pointing", "alignment")]:
            passes.append(_image_pass(subject, list(dict.fromkeys(metrics)), options, methods))
        total = sum(one.n_units * len(methods) for one in passes)
        done = 0
        for one in passes:
            _run(one, methods, options, store, results, partial(_shifted, on_step, done, total))
            done += one.n_units * len(methods)
        if "alignment" in options.metrics:
            results.alignment = _alignment(subject, options.batch_size)
        on_step("done", total, total)
    return results


def _shifted(on_step: OnStep, before: int, total: int, what: str, done: int) -> None:
    on_step(what, before + done, total)


def _run(
    one: _Pass,
    methods: Mapping[str, Method],
    options: ExplanationOptions,
    store: ScoreStore,
    results: Results,
    on_step: Callable[[str, int], None],
) -> None:
    """Batches in the outer loop, so that each is loaded once for all methods."""

    def settings(metric: str, method: str) -> dict[str, Any]:
        own = options.method_options.get(method, {})
        return {**one.identity, "metric": options.settings_of(metric), "method": [method, own]}

    scores: dict[tuple[str, str], Tensor | None] = {
        (metric, method): store.load(metric, method, settings(metric, method))
        for metric in one.metrics
        for method in methods
    }
    reasons: dict[tuple[str, str], str] = {}

    def n_done(key: tuple[str, str]) -> int:
        found = scores[key]
        return one.n_units if key in reasons else 0 if found is None else len(found)

    for start, stop in _batches(lambda: {n_done(key) for key in scores}, one.n_units, one.batch_size):
        compute = one.batch(start, stop)
        for method in methods:
            todo = [metric for metric in one.metrics if n_done((metric, method)) == start]
            if not todo:
                continue
            on_step(method, sum(min(n_done((metric, m)) for metric in one.metrics) for m in methods))
            try:
                found = compute(method, todo)
            except (CannotExplain, ModuleNotFoundError) as error:
                found = dict.fromkeys(todo, " ".join(str(error).split()))
            for metric, new in found.items():
                if isinstance(new, str):
                    reasons[metric, method] = new
                    continue
                before = scores[metric, method]
                together = new if before is None else torch.cat([before, new])
                scores[metric, method] = together
                store.save(metric, method, settings(metric, method), together)
    for metric in one.metrics:
        pairs = [(method, scores[metric, method]) for method in methods if (metric, method) not in reasons]
        results.scores[metric] = {method: found for method, found in pairs if found is not None}
        results.reasons[metric] = {m: reasons[metric, m] for m in methods if (metric, m) in reasons}


def _batches(done: Callable[[], set[int]], n_units: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of units that are still to be measured, none of them across a place where an earlier one stopped."""
    while (start := min(counts := done())) < n_units:
        later = [count for count in counts if count > start]
        yield start, min([start + batch_size, n_units, *later])


def _grid_pass(subject: Subject, grids: Tensor, options: ExplanationOptions, methods: Mapping[str, Method]) -> _Pass:
    assert subject.predictions is not None
    labels, settings = subject.predictions.labels, options.grid_pointing

    def batch(start: int, stop: int) -> Callable[[str, list[str]], dict[str, Tensor | str]]:
        x, targets = grid_input(subject, grids[start:stop], settings), labels[grids[start:stop]]
        return lambda method, _: {"grid_pointing": score_grids(subject.model, methods[method], x, targets, settings)}

    # A grid has the pixels of so many images.
    size = 1 if settings.rescale else settings.n**2
    batch_size = max(1, options.batch_size // size)
    return _Pass(["grid_pointing"], len(grids), batch_size, {"grids": grids, "targets": labels[grids]}, batch)


def _image_pass(
    subject: Subject, metrics: list[str], options: ExplanationOptions, methods: Mapping[str, Method]
) -> _Pass:
    def batch(start: int, stop: int) -> Callable[[str, list[str]], dict[str, Tensor | str]]:
        x = subject.load(list(subject.images[start:stop]))
        with torch.no_grad():
            targets = subject.model(x).argmax(1)
        return lambda method, todo: image_scores(
            todo, Case(method, methods[method], subject.model, x, targets, options)
        )

    return _Pass(metrics, len(subject.images), options.batch_size, {"images": list(subject.images)}, batch)


def _alignment(subject: Subject, batch_size: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    images: Sequence[int] = subject.images
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for layer, value in cosine_alignment(subject.model, subject.load(list(part))).items():
            sums[layer] = sums.get(layer, 0.0) + value * len(part)
    return {layer: value / len(images) for layer, value in sums.items()}
