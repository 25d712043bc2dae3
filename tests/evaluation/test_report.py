"""Output of an evaluation of explanations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from bcos_train.evaluation import measure
from bcos_train.evaluation.report import evaluate_explanations
from bcos_train.evaluation.summary import tables, to_json
from bcos_train.explanation.method import GuidedBackprop

from .toys import make_options, make_subject

METHODS = ["bcos", "guided_backprop", "ixg"]


def evaluate(output: Path, **changes: Any) -> dict[str, Any]:
    options = make_options(methods=METHODS, metrics=["grid_pointing", "completeness", "alignment"], **changes)
    origin, identity = {"model": "toy", "weights": "none"}, {"dataset": "toys"}
    evaluate_explanations(make_subject(), options, output, title="toy on noise", origin=origin, identity=identity)
    content: dict[str, Any] = json.loads((output / "explanations.json").read_text())
    return content


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    evaluate(folder)
    return folder


def test_json_contains_the_measurements(output: Path) -> None:
    content = json.loads((output / "explanations.json").read_text())
    options = make_options(methods=METHODS, metrics=["grid_pointing", "completeness", "alignment"])
    scores = measure(make_subject(), options).scores["grid_pointing"]
    grid = content["metrics"]["grid_pointing"]
    assert (grid["uniform"], grid["n_grids"], grid["better"]) == (0.25, 5, "larger")
    for method in ("bcos", "ixg"):
        found = grid["methods"][method]
        assert found["mean"] == pytest.approx(scores[method].mean().item(), rel=1e-4)
        assert found["p50"] == pytest.approx(torch.quantile(scores[method], 0.5).item(), rel=1e-4)
        assert found["low"] <= found["mean"] <= found["high"]
    assert "has no nn.ReLU" in grid["methods"]["guided_backprop"]["reason"]
    assert content["metrics"]["completeness"]["better"] == "smaller"
    assert set(content["alignment"]["layers"]) == {"conv", "head"}
    assert (content["model"], content["n_images"]) == ("toy", 7)
    assert content["settings"]["grid_pointing"]["smooth"] == 3


def test_scores_of_every_sample(output: Path) -> None:
    with np.load(output / "explanations.npz") as content:
        assert content["grid_pointing/bcos"].shape == content["grids"].shape == (5, 4)
        assert content["completeness/ixg"].shape == content["images"].shape == (7,)


@pytest.mark.parametrize("name", ["grid_pointing", "completeness", "grids"])
def test_figures_show_something(name: str, output: Path) -> None:
    image = imread(output / "explanations" / f"{name}.png")
    assert min(image.shape[:2]) > 200
    assert image[..., :3].std() > 0.05


def test_second_evaluation_measures_nothing(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: Any, method: Any, *_: Any) -> None:
        if not isinstance(method, GuidedBackprop):  # the one that can't explain the model is asked again
            raise AssertionError("measured anew")
        method(model, torch.zeros(1, 6, 8, 8), torch.zeros(1, 1, dtype=torch.long))

    before = json.loads((output / "explanations.json").read_text())
    monkeypatch.setattr("bcos_train.evaluation.measuring.score_grids", fail)
    assert evaluate(output) == before
    out = capsys.readouterr().out
    assert "toy on noise" in out
    assert f"{before['metrics']['grid_pointing']['methods']['bcos']['mean']:.3f}" in out
    assert "guided_backprop, grid pointing: TinyNet has no nn.ReLU" in out


def test_no_grids_leave_a_line_and_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = evaluate(tmp_path, grid={"threshold": 1.0})
    assert content["metrics"]["grid_pointing"]["n_grids"] == 0
    assert "no grid of 2x2 classes: too few images" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "explanations" / "grids.png").exists()
    assert (tmp_path / "explanations" / "completeness.png").exists()


def test_metrics_of_boxes_show_the_score_of_a_uniform_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = make_options(methods=["bcos"], metrics=["energy_pointing", "iou", "sparsity"])
    results = evaluate_explanations(make_subject(), options, tmp_path, title="toy", origin={}, identity={})
    content = json.loads((tmp_path / "explanations.json").read_text())["metrics"]
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("energy_pointing", "iou"):
        assert (content[name]["uniform"], content[name]["n_objects"]) == (pytest.approx(results.box_share), 10)
        assert content[name]["methods"]["bcos"]["n"] == 10
        assert (tmp_path / "explanations" / f"{name}.png").exists()
    assert shown.count(f"uniform {results.box_share:.3f}") == 2
    assert "means over 7 images and 10 pairs of image and class" in shown


@pytest.mark.parametrize(("width", "n_tables"), [(60, 3), (80, 2), (200, 1)])
def test_tables_fit_the_terminal(width: int, n_tables: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = make_options(metrics=["sparsity", "completeness", "deletion"])
    found, lines = tables(to_json(measure(make_subject(), options), options), options, "title", width)
    assert len(found) == n_tables
    console = Console(width=width)
    for part in found:
        console.print(part)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "\\" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert lines[0] == "grad_cam, completeness: its maps are not meant to sum to the logit"
