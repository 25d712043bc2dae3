"""Explanations while training, and of a run: what is logged, that training doesn't notice, what an evaluation adds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.toys import make_options
from matplotlib.figure import Figure

from bcos_train.dataset import BcosEncoding
from bcos_train.distillation import DistillationOptions, Teacher
from bcos_train.evaluation import BOX_METRICS, Results
from bcos_train.evaluation import METRICS as ALL_METRICS
from bcos_train.explanation import explain
from bcos_train.loss import BinaryCrossEntropy
from bcos_train.report import Explained, pair_gallery
from bcos_train.run import evaluate, train
from bcos_train.runs.layout import read_metrics
from bcos_train.task import Distillation
from bcos_train.training.callbacks.explanations import (
    ExplanationCallback,
    GalleryCallback,
    PredictionRecorder,
    logged_metrics,
)
from bcos_train.training.config import restore_dataset_settings

from ..runs import TINY, assert_same_state, compose, final_state, run_folder
from ..toys import TinyNet, fit, make_data, make_module

#: Those that digits, which have no boxes, can be measured by.
METRICS = [name for name in ALL_METRICS if name not in BOX_METRICS]
WITHOUT = (*TINY, "limit_train=16")
EXPLAINED = (
    *(text for text in WITHOUT if text != "explanation=none"),
    "explanation.methods=[bcos,smooth_grad,rise]",
    f"explanation.metrics=[{','.join(METRICS)}]",
    "explanation.method_options={smooth_grad: {n_samples: 2}, rise: {n_masks: 4}}",
    "explanation.every_n_epochs=1",
    "explanation.n_images=2",
    "explanation.gallery_images=2",
    # Every image that is classified correctly makes a grid.
    "explanation.grid_pointing.n=1",
    "explanation.grid_pointing.threshold=0",
    "explanation.grid_pointing.n_grids=3",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train(compose(runs, *EXPLAINED, "checkpointing.monitor=explanation/grid_pointing")) == 0
    return run_folder(runs)


def test_training_does_not_notice(run: Path, tmp_path: Path) -> None:
    """Weights, statistics, averages and the state of the optimizer, bit for bit."""
    assert train(compose(tmp_path, *WITHOUT)) == 0
    with_, without = final_state(run), final_state(run_folder(tmp_path))
    for state in (with_, without):
        state.pop("callbacks")  # the checkpointer's monitor
    assert_same_state(with_, without)


def test_what_is_logged(run: Path) -> None:
    rows = [row for row in read_metrics(run / "metrics.csv") if "explanation/n" in row or "explanation/sparsity" in row]
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert {f"explanation/{metric}" for metric in METRICS} <= row.keys()
        assert "explanation/sparsity/rise" in row
        assert "explanation/completeness/rise" not in row
        assert "val/acc1" in row, "beside accuracy"
        n_grids = row["explanation/grid_pointing/n_grids"]
        assert n_grids == min(3, round(row["val/acc1"] * 21 / 100))
        if n_grids:
            assert row["explanation/grid_pointing"] == pytest.approx(1)
            assert row["explanation/grid_pointing/p50"] == row["explanation/grid_pointing/rise"] == pytest.approx(1)
        else:
            assert math.isnan(row["explanation/grid_pointing"])
    assert max(row["explanation/grid_pointing/n_grids"] for row in rows) > 0
    assert len(list((run / "explanations").glob("*.png"))) == 2


def test_best_checkpoint_by_an_explanation_metric(run: Path) -> None:
    (best,) = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["score"] == pytest.approx(1)
    assert best["file"].startswith("epoch-0001-explanation_grid_pointing-1.0000")


def test_without_grids_the_score_is_no_number_and_is_logged() -> None:
    """So that a monitor of it is known from the first epoch on, and no such epoch is the best."""
    found = logged_metrics(Results(scores={"grid_pointing": {}}, grids=torch.empty(0, 9, dtype=torch.long)))
    assert math.isnan(found["explanation/grid_pointing"])
    assert found["explanation/grid_pointing/n_grids"] == 0


def test_without_grids_the_summary_is_json_all_the_same(tmp_path: Path) -> None:
    options = ("limit_val=5", "trainer.max_epochs=1", "explanation.grid_pointing.n=3", "explanation.n_images=2")
    config = compose(tmp_path, *(text for text in WITHOUT if text != "explanation=none"), *options)
    assert train(config) == 0
    folder = run_folder(tmp_path)
    text = (folder / "summary.json").read_text()
    metrics = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))["metrics"]
    assert metrics["explanation/grid_pointing"] is None
    assert metrics["explanation/grid_pointing/n_grids"] == 0
    assert math.isfinite(metrics["explanation/completeness"])
    assert math.isnan(read_metrics(folder / "metrics.csv")[-1]["explanation/grid_pointing"])
    assert train(config) == 0
    assert (folder / "summary.json").read_text() == text, "the run counts as ended"


def test_recorder_has_the_predictions_of_the_validation(tmp_path: Path) -> None:
    recorder, data = PredictionRecorder(), make_data()
    module = fit(tmp_path, recorder, data=data)
    images, labels = data.val_samples(range(data.num_val))
    module.eval()
    with torch.no_grad():
        probabilities = module(images).sigmoid()
    found = recorder.predictions
    assert found is not None
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.predictions, probabilities.argmax(1))
    torch.testing.assert_close(found.confidences, probabilities.amax(1))


# ---- distillation


@pytest.mark.parametrize("kind", ["weights", "contributions"])
def test_gallery_of_teacher_and_student(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def record(rgb: torch.Tensor, teacher: Explained, student: Explained, *args: Any, **options: Any) -> Figure:
        calls.append({"rgb": rgb, "teacher": teacher, "student": student, "others": args, **options})
        return pair_gallery(rgb, teacher, student, *args, **options)

    monkeypatch.setattr("bcos_train.training.callbacks.distillation.pair_gallery", record)
    data = make_data()
    module = make_module(data)
    torch.manual_seed(5)
    teacher = Teacher(TinyNet(), "a teacher", BcosEncoding())
    options = DistillationOptions(teacher="toy", explanation=kind)  # the explanations have no part in the loss
    module.task = Distillation(BinaryCrossEntropy(), teacher, options, module.model)
    folder = tmp_path / "explanations"
    explanations = ExplanationCallback(make_options(metrics=[], gallery_images=3), folder, "a run", module.task)
    fit(tmp_path, explanations, GalleryCallback(explanations), data=data, module=module, epochs=2)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    call, images = calls[-1], data.fixed_val_samples(3)
    rgb = images[0] / 255
    torch.testing.assert_close(call["rgb"], rgb)
    x = torch.cat([rgb, 1 - rgb], 1)
    explained = teacher.model(x).argmax(1)
    for name, model in (("teacher", teacher.model), ("student", module.model.eval())):
        expected = explain(model, x, explained)
        values = expected.weights if kind == "weights" else expected.contribution_map
        torch.testing.assert_close(call[name].explanation, values, msg=name)
        assert torch.equal(call[name].prediction, expected.prediction), name
    labels, names, similarity = call["others"]
    assert torch.equal(labels, images[1])
    assert list(names) == [f"class {k}" for k in range(4)]
    pair = (call[name].explanation.flatten(1) for name in ("teacher", "student"))
    torch.testing.assert_close(similarity, torch.nn.functional.cosine_similarity(*pair))
    assert call["epoch"] == 2
    assert call["title"] == "a run"


def test_no_gallery_of_teacher_and_student_if_it_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcos_train.training.callbacks.explanations.draw_pair_gallery", None)
    data = make_data()
    module = make_module(data)
    teacher = Teacher(TinyNet(), "a teacher", BcosEncoding())
    task = Distillation(BinaryCrossEntropy(), teacher, DistillationOptions(teacher="toy"), module.model)
    explanations = ExplanationCallback(make_options(metrics=[], gallery_images=0), tmp_path / "explanations", "", task)
    fit(tmp_path, explanations, GalleryCallback(explanations), data=data, module=module, epochs=1)
    assert not list((tmp_path / "explanations").iterdir())


# ---- evaluation


def test_evaluation_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (
        "explanation.methods=[bcos,deep_lift]",
        "explanation.metrics=[grid_pointing,sparsity,alignment]",
        "explanation.gallery_images=0",
    )
    config = compose(tmp_path, *settings, name="evaluate") | {"run": str(run), "output": str(tmp_path)}
    assert evaluate(config, ["run", "output", *(text.partition("=")[0] for text in settings)]) == 0
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert content["settings"]["methods"] == ["bcos", "deep_lift"]
    assert content["settings"]["grid_pointing"]["n"] == 1, "as in the run"
    assert content["metrics"]["grid_pointing"]["methods"]["bcos"]["mean"] == pytest.approx(1)
    assert "reason" in content["metrics"]["grid_pointing"]["methods"]["deep_lift"]
    assert (tmp_path / "explanations" / "grids.png").stat().st_size > 5_000
    # Beside accuracy, for the Model Zoo's table.
    beside = json.loads((tmp_path / "evaluation.json").read_text())
    assert beside["explanation/sparsity"] == pytest.approx(content["metrics"]["sparsity"]["methods"]["bcos"]["mean"])
    assert not [key for key in beside if key.count("/") > 1]
    assert "deep_lift: BcosResNet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "n"),
    [
        pytest.param(["explanation"], 2, id="the group: as the run's data set has it"),
        pytest.param(["explanation", "explanation.grid_pointing.n"], 3, id="the key itself"),
        pytest.param(["explanation", "dataset"], 3, id="another data set"),
        pytest.param(["explanation.methods"], 3, id="not the group"),
    ],
)
def test_choices_of_the_runs_data_set_stay(given: list[str], n: int) -> None:
    def config(n: int) -> dict[str, Any]:
        return {"explanation": {"grid_pointing": {"n": n, "smooth": 15}, "perturbation": {"block": 16}}}

    laid_over = config(3)
    kept = restore_dataset_settings(laid_over, config(2), given)
    assert kept["explanation"]["grid_pointing"]["n"] == n
    assert laid_over == config(3)
    assert restore_dataset_settings(laid_over, {"explanation": None}, given) == laid_over
