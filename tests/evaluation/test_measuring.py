"""Measurements: values, the same images for all methods, and resuming after an interruption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcos_train.evaluation import BOX_METRICS, METRICS, ScoreStore, Subject, measure, summarize
from bcos_train.evaluation.subject import grid_input
from bcos_train.explanation.method import METHODS, make_method
from bcos_train.metric import (
    area_under_curve,
    choose_grids,
    compose_grids,
    cosine_alignment,
    gini_index,
    grid_pointing_scores,
    iou_scores,
    noise_stability,
    perturbation_curve,
    shift_stability,
)

from .toys import SIDE, TinyNet, boxes, make_options, make_subject


def test_grid_pointing_is_that_of_the_metric_functions() -> None:
    """One grid and one class at a time; batches of two grids."""
    subject, options = make_subject(), make_options(metrics=["grid_pointing"])
    results = measure(subject, options)
    found = subject.predictions
    assert found is not None
    grids = choose_grids(found.labels, found.predictions, found.confidences, 2, 5, threshold=0.2, seed=0)
    assert len(grids) == 5
    assert results.grids is not None
    assert torch.equal(results.grids, grids)
    for name in options.methods:
        method, expected = make_method(name), []
        for grid in grids:
            x = compose_grids(subject.load(grid.tolist())[None])
            maps = [method(subject.model, x, torch.tensor([[int(found.labels[i])]]))[0, 0] for i in grid]
            expected.append(grid_pointing_scores(torch.stack(maps)[None], smooth=3)[0])
        torch.testing.assert_close(results.scores["grid_pointing"][name], torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_image_metrics_are_those_of_the_metric_functions() -> None:
    subject = make_subject()
    metrics = [name for name in METRICS if name not in ("grid_pointing", *BOX_METRICS)]
    results = measure(subject, make_options(methods=["ixg"], metrics=metrics))
    x, method, model = subject.load(subject.images), make_method("ixg"), subject.model
    with torch.no_grad():
        target = model(x).argmax(1)
    maps = method(model, x, target[:, None])[:, 0]

    def area(**options: Any) -> Tensor:
        return area_under_curve(perturbation_curve(model, x, maps, target, block=2, **options))

    expected = {
        "deletion": area(),
        "insertion": area(insert=True, baseline="blur"),
        "pixel_perturbation": area(order="least"),
        "sparsity": gini_index(maps),
        "shift_stability": shift_stability(method, model, x, target[:, None], shift=1)[:, 0],
        "noise_stability": noise_stability(method, model, x, target[:, None], std=0.05, n_samples=2)[:, 0],
    }
    for name, scores in expected.items():
        torch.testing.assert_close(results.scores[name]["ixg"], scores, rtol=1e-4, atol=1e-5)
    assert results.alignment == pytest.approx(cosine_alignment(model, x), rel=1e-4)


def test_metrics_of_boxes_are_those_of_the_metric_functions() -> None:
    """One pair of an image and a class at a time; batches of three pairs."""
    subject = make_subject()
    results = measure(subject, make_options(methods=["ixg", "bcos"], metrics=list(BOX_METRICS), batch_size=3))
    method, energy, iou, shares = make_method("ixg"), [], [], []
    for image in subject.images:
        rows = boxes([image])[0]
        for label in range(5):
            mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            for _, x0, y0, x1, y1 in rows[rows[:, 0] == label].tolist():
                mask[y0:y1, x0:x1] = True
            if mask.any():
                attribution = method(subject.model, subject.load([image]), torch.tensor([[label]]))[0, 0]
                positive = attribution.clamp(min=0)
                energy.append(positive[mask].sum() / positive.sum().clamp(min=1e-7))
                iou.append(iou_scores(attribution, mask))
                shares.append(mask.float().mean())
    assert len(energy) == results.objects == 10
    torch.testing.assert_close(results.scores["energy_pointing"]["ixg"], torch.stack(energy))
    torch.testing.assert_close(results.scores["iou"]["ixg"], torch.stack(iou))
    assert results.box_share == pytest.approx(float(torch.stack(shares).mean()))


def test_a_uniform_map_scores_the_share_of_the_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(*targets.shape, *x.shape[2:])

    monkeypatch.setitem(METHODS, "rise", lambda: uniform)
    results = measure(make_subject(), make_options(methods=["rise"], metrics=list(BOX_METRICS)))
    for metric in BOX_METRICS:
        assert results.scores[metric]["rise"].mean().item() == pytest.approx(results.box_share)


def test_maps_without_positive_evidence_score_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of which it is only rounding."""

    def tiny(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        maps = torch.full((*targets.shape, *x.shape[2:]), -1.0)
        maps[..., 3, 3] = 0.9e-7
        return maps

    monkeypatch.setitem(METHODS, "rise", lambda: tiny)
    results = measure(make_subject(), make_options(methods=["rise"], metrics=["energy_pointing"]))
    assert results.scores["energy_pointing"]["rise"].tolist() == [0.0] * 10


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (make_subject(has_boxes=False), "the data set has no boxes"),
        (replace(make_subject(), boxes=lambda i: torch.full((len(i), 1, 5), -1)), "no image has a box"),
    ],
    ids=["data set", "images"],
)
def test_without_boxes(subject: Subject, reason: str) -> None:
    results = measure(subject, make_options(methods=["bcos"], metrics=list(BOX_METRICS)))
    for metric in BOX_METRICS:
        assert (results.scores[metric], results.reasons[metric]) == ({}, {"bcos": reason})
    assert results.box_share is None


def test_completeness_needs_maps_that_sum_to_the_logit() -> None:
    methods = ["bcos", "bcos_relative", "gradient", "int_grad"]
    results = measure(make_subject(), make_options(methods=methods, metrics=["completeness"]))
    scores, reasons = results.scores["completeness"], results.reasons["completeness"]
    assert list(scores) == ["bcos", "int_grad"]
    assert scores["bcos"].max() < 1e-4
    assert reasons.keys() == {"bcos_relative", "gradient"}


def test_all_methods_see_the_same_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}

    def spy(name: str) -> Callable[[], Any]:
        def method(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
            seen.setdefault(name, []).append(x.clone())
            return torch.ones(*targets.shape, *x.shape[2:])

        return lambda: method

    for name in ("bcos", "rise"):
        monkeypatch.setitem(METHODS, name, spy(name))
    results = measure(make_subject(), make_options(methods=["bcos", "rise"], metrics=["grid_pointing"]))
    a, b = (torch.cat(seen[name]) for name in ("bcos", "rise"))
    assert len(a) == 5
    assert torch.equal(a, b)
    torch.testing.assert_close(results.scores["grid_pointing"]["rise"], torch.full((5, 4), 0.25))


def test_rescaled_grids_have_the_size_of_an_image() -> None:
    subject = make_subject()
    options = make_options(grid={"rescale": True}).grid_pointing
    x = grid_input(subject, torch.arange(8).view(2, 4), options)
    assert x.shape == (2, 6, SIDE, SIDE)
    torch.testing.assert_close(x[:, :3] + x[:, 3:], torch.ones_like(x[:, :3]))


class OneSize(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != SIDE:
            raise ValueError(f"images of {SIDE} pixels")
        return super().forward(x)


@pytest.mark.parametrize("grid", [{"rescale": True}, {"stride": 4}], ids=str)
def test_models_of_one_size(grid: dict[str, Any]) -> None:
    subject = make_subject(OneSize())
    options = make_options(methods=["bcos"], metrics=["grid_pointing"])
    reason = measure(subject, options).reasons["grid_pointing"]["bcos"]
    assert "the model takes no grid of 16x16 pixels (images of 8 pixels)" in reason
    assert "rescale=true" in reason
    scores = measure(subject, make_options(methods=["bcos"], metrics=["grid_pointing"], grid=grid)).scores
    assert scores["grid_pointing"]["bcos"].shape == (5, 4)


def test_method_that_cannot_explain_has_a_reason() -> None:
    results = measure(make_subject(), make_options(methods=["guided_backprop", "bcos", "deep_lift"]))
    for metric in ("grid_pointing", "sparsity"):
        assert list(results.scores[metric]) == ["bcos"]
        assert "has no nn.ReLU" in results.reasons[metric]["guided_backprop"]
        assert "has a rule" in results.reasons[metric]["deep_lift"]


def test_no_grids() -> None:
    results = measure(make_subject(), make_options(grid={"threshold": 1.0}))
    assert results.grids is not None
    assert len(results.grids) == 0
    assert results.scores["grid_pointing"] == {}
    assert "too few images" in results.reasons["grid_pointing"]["bcos"]
    assert len(results.scores["sparsity"]["bcos"]) == 7


def test_model_is_unchanged() -> None:
    model = TinyNet()
    subject = make_subject(model)
    model.train()
    model.conv.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    measure(subject, make_options(metrics=list(METRICS), methods=["bcos", "ixg", "smooth_grad"]))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random[0], torch.get_rng_state())
    assert (random[1] == np.random.get_state()[1]).all()  # type: ignore[index]


# ---- going on


class Counting:
    """A method that counts its images, and may be interrupted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += len(x)
        return METHODS["ixg"]()(model, x, targets)


def run_counted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, subject: Subject, stop_after: int | None = None, **changes: Any
) -> tuple[int, Any]:
    counting = Counting(stop_after)
    monkeypatch.setitem(METHODS, "bcos", lambda: counting)
    options = make_options(**{"methods": ["bcos", "gradient"], "batch_size": 4, **changes})
    try:
        return counting.calls, measure(subject, options, ScoreStore(folder, {"model": "a"}))
    except KeyboardInterrupt:
        return counting.calls, None
    finally:
        run_counted.calls = counting.calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("batch_size", [4, 12], ids=lambda n: f"then batches of {n}")
def test_resuming_after_an_interruption(
    stop_after: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 grids one by one, then 7 images in fours: nothing is measured twice, and the scores are the same."""
    subject = make_subject()
    _, whole = run_counted(monkeypatch, tmp_path / "whole", subject)
    assert run_counted.calls == 12  # type: ignore[attr-defined]
    _, stopped = run_counted(monkeypatch, tmp_path / "parts", subject, stop_after)
    assert stopped is None
    done = run_counted.calls  # type: ignore[attr-defined]
    _, rest = run_counted(monkeypatch, tmp_path / "parts", subject, batch_size=batch_size)
    assert done + run_counted.calls == 12  # type: ignore[attr-defined]
    for metric, scores in whole.scores.items():
        for method, values in scores.items():
            torch.testing.assert_close(rest.scores[metric][method], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        pytest.param({}, 0, id="nothing"),
        pytest.param({"methods": ["bcos", "gradient", "ixg"]}, 0, id="one more method"),
        pytest.param({"metrics": ["grid_pointing", "sparsity", "deletion"]}, 7, id="one more metric"),
        pytest.param({"grid": {"smooth": 1}}, 5, id="a setting of the grids"),
        pytest.param({"grid": {"seed": 1}}, 5, id="other grids"),
    ],
)
def test_what_is_measured_again(
    changes: dict[str, Any], calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject()
    run_counted(monkeypatch, tmp_path, subject)
    run_counted(monkeypatch, tmp_path, subject, **changes)
    assert run_counted.calls == calls  # type: ignore[attr-defined]


def test_other_images_and_damaged_files_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    run_counted(monkeypatch, tmp_path, subject)
    (tmp_path / "grid_pointing" / "bcos.npz").write_bytes(b"PK\x03\x04 broken")
    run_counted(monkeypatch, tmp_path, replace(subject, images=[0, 1]))
    assert run_counted.calls == 5 + 2  # type: ignore[attr-defined]
    assert not list(tmp_path.rglob("*.tmp"))


def test_progress_is_monotonic() -> None:
    steps: list[tuple[int, int]] = []
    measure(make_subject(), make_options(), on_step=lambda what, done, total: steps.append((done, total)))
    assert {total for _, total in steps} == {3 * (5 + 7)}
    done = [value for value, _ in steps]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 36


def test_summary() -> None:
    numbers = summarize(torch.tensor([[0.0, 0.5], [0.5, 1.0]]))
    assert (numbers["mean"], numbers["p50"], numbers["p100"], numbers["n"]) == (0.5, 0.5, 1.0, 2)
    assert (numbers["low"], numbers["high"]) == (0.25, 0.75)
    assert summarize(torch.tensor([float("nan"), 1.0]))["mean"] is None


def test_no_metric_is_measured_in_tf32() -> None:
    """Neither all together nor by the metric functions that run the model themselves."""
    subject, seen = make_subject(), []

    def look(*_: Any) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)

    subject.model.register_forward_hook(look)
    before = torch.backends.cudnn.allow_tf32
    measure(subject, make_options(methods=["ixg"], metrics=list(METRICS)))
    x, targets = subject.load([0, 1]), torch.tensor([[0], [1]])
    cosine_alignment(subject.model, x)
    perturbation_curve(subject.model, x, x.sum(1), targets[:, 0], block=4)
    shift_stability(make_method("ixg"), subject.model, x, targets)
    make_method("ixg")(subject.model, x, targets)
    assert len(seen) > 10
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before
