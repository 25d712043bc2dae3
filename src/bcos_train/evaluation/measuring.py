"""Measure every metric of every method batch by batch, on the same images and grids for all methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bcos_train.evaluation.objects import BoxedObject, find_objects, mean_box_share, object_masks
from bcos_train.evaluation.options import BOX_METRICS, ExplanationOptions
from bcos_train.evaluation.scoring import Case, score_grids, score_images
from bcos_train.evaluation.store import ScoreStore
from bcos_train.evaluation.subject import Subject, draw_grids, grid_incompatibility, grid_input
from bcos_train.explanation import evaluating, without_tf32
from bcos_train.explanation.method import CannotExplain, Method
from bcos_train.metric import cosine_alignment

__all__ = ["Results", "measure"]

#: ``on_step(method, done, total)``, called before each batch of each method with the number of finished units (images
#: or grids, counted per method).
OnStep = Callable[[str, int, int], None]


@dataclass
class Results:
    """Measured scores.

    Attributes:
        scores: metric -> method -> scores (units, ...): (G, K) for grids, (N,) for images; in order of the units.
        reasons: metric -> method -> why there are no scores.
        alignment: Mean |cos| of each B-cos layer; empty if not requested or there are no such layers.
        grids: (G, K) indices in the validation set, in reading order of the cells; None if not requested.
        images: Indices of the images of the other metrics.
        objects: Number of pairs of an image and a class with boxes, the units of metrics that need boxes.
        box_share: Mean share of an image inside the boxes of a class: the score of a uniform map; None without boxes.
    """

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    alignment: dict[str, float] = field(default_factory=dict)
    grids: Tensor | None = None
    images: list[int] = field(default_factory=list)
    objects: int = 0
    box_share: float | None = None


#: (method, metrics) -> metric -> scores of one batch of units, or the reason why there are none.
_BatchScores = Callable[[str, list[str]], dict[str, Tensor | str]]


@dataclass
class MetricGroup:
    """Metrics that are measured on the same units.

    Attributes:
        metrics: Their names.
        n_units: Number of images or grids.
        batch_size: Units per batch.
        identity: Everything that the scores depend on besides the metric and the method.
        load_batch: Loads units start ... stop-1 and returns the function that scores them.
    """

    metrics: list[str]
    n_units: int
    batch_size: int
    identity: Mapping[str, object]
    load_batch: Callable[[int, int], _BatchScores]


def measure(
    subject: Subject,
    options: ExplanationOptions,
    store: ScoreStore | None = None,
    on_step: OnStep = lambda what, done, total: None,
) -> Results:
    """Measure the requested metrics of the requested methods.

    The model runs in evaluation mode; its mode is restored.

    Args:
        subject: Model and images.
        options: Methods, metrics and their settings.
        store: Stores scores between calls; stored scores are not measured again. ``None``: store nothing.
        on_step: Progress callback.
    """
    store = ScoreStore(None, {}) if store is None else store
    methods = options.make_methods()
    results = Results(images=list(subject.images))
    groups = []
    with evaluating(subject.model), without_tf32():
        if "grid_pointing" in options.metrics and subject.predictions is not None:
            results.grids = draw_grids(subject.predictions, options.grid_pointing)
            if (reason := grid_incompatibility(subject, results.grids, options.grid_pointing)) is None:
                groups.append(_grid_group(subject, results.grids, options, methods))
            else:
                results.scores["grid_pointing"] = {}
                results.reasons["grid_pointing"] = dict.fromkeys(methods, reason)
        others = [name for name in options.metrics if name not in ("grid_pointing", "alignment", *BOX_METRICS)]
        if metrics := list(dict.fromkeys(others)):
            groups.append(_image_group(subject, metrics, options, methods))
        if metrics := [name for name in BOX_METRICS if name in options.metrics]:
            objects = find_objects(subject, options.batch_size)
            if objects:
                results.objects = len(objects)
                results.box_share = mean_box_share(subject, objects, options.batch_size)
                groups.append(_object_group(subject, objects, metrics, options, methods))
            reason = "the data set has no boxes" if subject.boxes is None else "no image has a box"
            for metric in metrics if not objects else ():
                results.scores[metric], results.reasons[metric] = {}, dict.fromkeys(methods, reason)
        total = sum(group.n_units * len(methods) for group in groups)
        done = 0
        for group in groups:
            _run(group, methods, options, store, results, partial(_report_step, on_step, done, total))
            done += group.n_units * len(methods)
        if "alignment" in options.metrics:
            results.alignment = _alignment(subject, options.batch_size)
        on_step("done", total, total)
    return results


def _report_step(on_step: OnStep, done_before: int, total: int, method: str, done: int) -> None:
    """Report the progress of a group as that of all groups."""
    on_step(method, done_before + done, total)


def _run(
    group: MetricGroup,
    methods: Mapping[str, Method],
    options: ExplanationOptions,
    store: ScoreStore,
    results: Results,
    on_step: Callable[[str, int], None],
) -> None:
    """Measure one group, with batches in the outer loop so that each is loaded once for all methods."""

    def settings(metric: str, method: str) -> dict[str, object]:
        method_options = options.method_options.get(method, {})
        return {**group.identity, "metric": options.settings_of(metric), "method": [method, method_options]}

    scores: dict[tuple[str, str], Tensor | None] = {
        (metric, method): store.load(metric, method, settings(metric, method))
        for metric in group.metrics
        for method in methods
    }
    reasons: dict[tuple[str, str], str] = {}

    def n_done(key: tuple[str, str]) -> int:
        if key in reasons:
            return group.n_units
        stored = scores[key]
        return 0 if stored is None else len(stored)

    for start, stop in _batches(lambda: {n_done(key) for key in scores}, group.n_units, group.batch_size):
        compute = group.load_batch(start, stop)
        for method in methods:
            todo = [metric for metric in group.metrics if n_done((metric, method)) == start]
            if not todo:
                continue
            on_step(method, sum(min(n_done((metric, m)) for metric in group.metrics) for m in methods))
            try:
                batch_scores = compute(method, todo)
            except (CannotExplain, ModuleNotFoundError) as error:
                batch_scores = dict.fromkeys(todo, " ".join(str(error).split()))
            for metric, new in batch_scores.items():
                if isinstance(new, str):
                    reasons[metric, method] = new
                    continue
                earlier = scores[metric, method]
                merged = new if earlier is None else torch.cat([earlier, new])
                scores[metric, method] = merged
                store.save(metric, method, settings(metric, method), merged)
    for metric in group.metrics:
        pairs = [(method, scores[metric, method]) for method in methods if (metric, method) not in reasons]
        results.scores[metric] = {method: values for method, values in pairs if values is not None}
        results.reasons[metric] = {m: reasons[metric, m] for m in methods if (metric, m) in reasons}


def _batches(done: Callable[[], set[int]], n_units: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of units that remain to be measured; none crosses the end of an earlier, interrupted measurement."""
    while (start := min(counts := done())) < n_units:
        later = [count for count in counts if count > start]
        yield start, min([start + batch_size, n_units, *later])


def _grid_group(
    subject: Subject, grids: Tensor, options: ExplanationOptions, methods: Mapping[str, Method]
) -> MetricGroup:
    assert subject.predictions is not None
    labels, settings = subject.predictions.labels, options.grid_pointing

    def load_batch(start: int, stop: int) -> _BatchScores:
        x, targets = grid_input(subject, grids[start:stop], settings), labels[grids[start:stop]]
        return lambda method, _: {"grid_pointing": score_grids(subject.model, methods[method], x, targets, settings)}

    # A grid has as many pixels as this many images.
    size = 1 if settings.rescale else settings.n**2
    batch_size = max(1, options.batch_size // size)
    return MetricGroup(
        ["grid_pointing"], len(grids), batch_size, {"grids": grids, "targets": labels[grids]}, load_batch
    )


def _image_group(
    subject: Subject, metrics: list[str], options: ExplanationOptions, methods: Mapping[str, Method]
) -> MetricGroup:
    def load_batch(start: int, stop: int) -> _BatchScores:
        x = subject.load(list(subject.images[start:stop]))
        with torch.no_grad():
            targets = subject.model(x).argmax(1)
        return lambda method, todo: score_images(
            todo, Case(method, methods[method], subject.model, x, targets, options)
        )

    return MetricGroup(metrics, len(subject.images), options.batch_size, {"images": list(subject.images)}, load_batch)


def _object_group(
    subject: Subject,
    objects: list[BoxedObject],
    metrics: list[str],
    options: ExplanationOptions,
    methods: Mapping[str, Method],
) -> MetricGroup:
    def load_batch(start: int, stop: int) -> _BatchScores:
        chosen = objects[start:stop]
        x = subject.load([item.image for item in chosen])
        targets = torch.tensor([item.label for item in chosen], device=x.device)
        masks = object_masks(subject, chosen).to(x.device)
        return lambda method, todo: score_images(
            todo, Case(method, methods[method], subject.model, x, targets, options, masks)
        )

    identity = {"objects": [[item.image, item.label, item.boxes] for item in objects]}
    return MetricGroup(metrics, len(objects), options.batch_size, identity, load_batch)


def _alignment(subject: Subject, batch_size: int) -> dict[str, float]:
    """Return the mean |cos| of each B-cos layer over the images."""
    sums: dict[str, float] = {}
    images: Sequence[int] = subject.images
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for layer, value in cosine_alignment(subject.model, subject.load(list(part))).items():
            sums[layer] = sums.get(layer, 0.0) + value * len(part)
    return {layer: value / len(images) for layer, value in sums.items()}
