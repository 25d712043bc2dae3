"""Evaluating rows of the Model Zoo: stored results, skipped rows and messages."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bcos_train import create_model
from bcos_train.config.composition import Composer
from bcos_train.evaluation import zoo_rows
from bcos_train.evaluation.zoo_rows import (
    EvaluationFailed,
    MissingWeights,
    RowWeights,
    Settings,
    evaluate_arguments,
    evaluate_row,
    evaluate_rows,
    find_own_weights,
)
from bcos_train.report.zoo_table import N_VAL, Row
from bcos_train.weights import RECORDS
from bcos_train.weights.download import WeightsError

ROOT = Path(__file__).parents[2]
NAMES = ["resnet18", "resnet34", "simple_vit_ti_patch16_224"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take counts from the records, and pretend that official files exist."""
    monkeypatch.setattr(zoo_rows, "model_cost", lambda name: (RECORDS[name].params, 1.0))
    monkeypatch.setattr(zoo_rows, "download_official", lambda row: Path(row.file))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    return tmp_path / "imagenet"


class Evaluation:
    """Fake evaluation that records its calls."""

    def __init__(self, count: int = N_VAL, fail: str = "", stop: str = "") -> None:
        self.count, self.fail, self.stop = count, fail, stop
        self.calls: list[tuple[str, RowWeights]] = []

    def __call__(self, name: str, source: RowWeights, settings: Settings, place: Path) -> Mapping[str, Any]:
        if name == self.stop:
            raise KeyboardInterrupt
        self.calls.append((name, source))
        if name == self.fail:
            raise EvaluationFailed("out of memory")
        top1 = RECORDS[name].top1 - 1
        result = {"acc1": top1, "acc5": 90.0, "count": self.count, "seconds": 100.0, "dataset": "imagenet"}
        return {**result, "explanation/completeness_error": 0.25, "loss": 1.0}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the written JSON, by name."""
    return {row["name"]: row for row in json.loads((folder / "model_zoo.json").read_text())["rows"]}


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


# ---- what is measured


def test_measured(data: Path, tmp_path: Path) -> None:
    evaluate = Evaluation()
    rows = by_name(evaluate_rows(NAMES, Settings(data=data), tmp_path / "zoo", evaluate))
    assert evaluate.names == NAMES
    row = rows["resnet34"]
    assert (row.status, row.top5, row.images, row.images_per_second) == ("measured", 90.0, N_VAL, N_VAL / 100)
    assert row.comparable
    assert row.difference("top1") == -1
    assert row.explanation == {"explanation/completeness_error": 0.25}
    assert table(tmp_path / "zoo")["resnet34"]["top1_difference"] == -1
    assert {path.name for path in (tmp_path / "zoo").glob("model_zoo.*")} == {
        f"model_zoo.{s}" for s in ("md", "csv", "json")
    }


@pytest.mark.parametrize(
    ("settings", "count"), [({"weights": "random"}, N_VAL), ({"limit": 200}, 200), ({}, 200), ({}, N_VAL + 1)]
)
def test_not_comparable(settings: dict[str, Any], count: int, data: Path, tmp_path: Path) -> None:
    rows = evaluate_rows(NAMES[:1], Settings(data=data, **settings), tmp_path, Evaluation(count))
    assert not rows[0].comparable
    assert rows[0].difference("top1") is None
    assert "not comparable" in (tmp_path / "model_zoo.md").read_text()


def test_without_data(tmp_path: Path) -> None:
    evaluate = Evaluation()
    rows = evaluate_rows(NAMES, Settings(), tmp_path, evaluate)
    assert evaluate.calls == []
    assert {row.status for row in rows} == {"no data"}
    assert [row.params for row in rows] == [RECORDS[name].params for name in NAMES]
    assert (tmp_path / "model_zoo.md").read_text().count("no data") == 2 * len(NAMES)


def test_only_listed(data: Path, tmp_path: Path) -> None:
    assert {row.status for row in evaluate_rows(NAMES, Settings(data=data), tmp_path, None)} == {"not evaluated"}


def test_unavailable_official_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(row: Any) -> Path:
        if row.name == "resnet34":
            raise WeightsError("no connection")
        return Path(row.file)

    monkeypatch.setattr(zoo_rows, "download_official", missing)
    rows = by_name(evaluate_rows(NAMES, Settings(data=data), tmp_path, Evaluation()))
    assert (rows["resnet34"].status, rows["resnet34"].reason) == ("no weights", "no connection")
    assert rows["resnet18"].status == rows["simple_vit_ti_patch16_224"].status == "measured"
    assert zoo_rows.summarize_failures([*rows.values()]) == ["no weights for 1 of 3 rows; resnet34: no connection"]
    assert not zoo_rows.is_complete([*rows.values()], "official")
    assert zoo_rows.is_complete([*rows.values()], "a folder")


def test_a_failed_row_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    rows = by_name(evaluate_rows(NAMES, Settings(data=data), tmp_path, Evaluation(fail="resnet34")))
    assert (rows["resnet34"].status, rows["resnet34"].reason) == ("failed", "out of memory")
    assert rows["simple_vit_ti_patch16_224"].status == "measured"
    assert zoo_rows.summarize_failures([*rows.values()]) == ["resnet34: failed: out of memory"]
    assert not zoo_rows.is_complete([*rows.values()], "official")
    again = Evaluation()
    evaluate_rows(NAMES, Settings(data=data), tmp_path, again)
    assert again.names == ["resnet34"]


# ---- going on


def test_interruption_only_loses_the_current_row(data: Path, tmp_path: Path) -> None:
    settings = Settings(data=data)
    with pytest.raises(KeyboardInterrupt):
        evaluate_rows(NAMES, settings, tmp_path, Evaluation(stop=NAMES[2]))
    assert [row["status"] for row in table(tmp_path).values()] == ["measured", "measured", "not evaluated"]
    again = Evaluation()
    rows = evaluate_rows(NAMES, settings, tmp_path, again)
    assert again.names == NAMES[2:]
    assert [row.status for row in rows] == ["measured"] * 3
    whole = evaluate_rows(NAMES, settings, tmp_path / "at once", Evaluation())
    assert rows == whole


@pytest.mark.parametrize(
    "change", [{"limit": 10}, {"batch_size": 3}, {"device": "cpu"}, {"weights": "random"}], ids=str
)
def test_other_settings_are_measured_again(change: dict[str, Any], data: Path, tmp_path: Path) -> None:
    settings = Settings(data=data)
    evaluate_rows(NAMES[:1], settings, tmp_path, Evaluation())
    again = Evaluation()
    evaluate_rows(NAMES[:1], replace(settings, **change), tmp_path, again)
    assert again.names == NAMES[:1]


def test_other_data_are_measured_again(data: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "val").mkdir(parents=True)
    evaluate_rows(NAMES[:1], Settings(data=data), tmp_path, Evaluation())
    again = Evaluation()
    evaluate_rows(NAMES[:1], Settings(data=tmp_path / "other"), tmp_path, again)
    assert again.names == NAMES[:1]


def test_other_weights_with_the_same_name_are_measured_again(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    settings = Settings(data=data, weights=str(own))
    for content, expected in ((b"a", ["resnet18"]), (b"a", []), (b"b", ["resnet18"])):
        (own / "resnet18.pth").write_bytes(content)
        evaluate = Evaluation()
        evaluate_rows(NAMES[:1], settings, tmp_path, evaluate)
        assert evaluate.names == expected


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"settings": {}, "row": 3}'])
def test_damaged_result_is_measured_again(text: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "rows" / "resnet18").mkdir(parents=True)
    (tmp_path / "rows" / "resnet18" / "row.json").write_text(text)
    evaluate = Evaluation()
    evaluate_rows(NAMES[:1], Settings(data=data), tmp_path, evaluate)
    assert evaluate.names == NAMES[:1]


def test_progress_counts_the_rows(data: Path, tmp_path: Path) -> None:
    """First the cost of each row, then the evaluations, where earlier results count as done."""
    evaluate_rows(NAMES[:1], Settings(data=data), tmp_path, Evaluation())
    steps: list[tuple[str, int, int]] = []
    evaluate_rows(NAMES, Settings(data=data), tmp_path, Evaluation(), lambda *step: steps.append(step))
    assert steps[:3] == [(f"{name}: parameters and GMACs", i, 3 - i) for i, name in enumerate(NAMES)]
    assert steps[3:] == [(NAMES[1], 1, 2), (NAMES[2], 2, 1), ("done", 3, 0)]
    steps.clear()
    evaluate_rows(NAMES, Settings(data=data), tmp_path, Evaluation(), lambda *step: steps.append(step))
    assert steps[3:] == [("done", 3, 0)]


# ---- weights


def test_random_weights_are_seeded_and_leave_the_generator_alone(data: Path, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def evaluate(name: str, source: RowWeights, settings: Settings, place: Path) -> Mapping[str, Any]:
        states.append(load_file(source.setting[1]))
        return Evaluation()(name, source, settings, place)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for folder in ("a", "b"):
        evaluate_rows(["simple_vit_ti_patch16_224"], Settings(data=data, weights="random"), tmp_path / folder, evaluate)
    assert torch.equal(torch.rand(1), expected)
    assert states[0].keys() == create_model("simple_vit_ti_patch16_224").state_dict().keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("file", ["resnet18.safetensors", "resnet18.pth", "resnet18.ckpt", "resnet_18-68b4160fff.pth"])
def test_own_file(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    assert find_own_weights("resnet18", tmp_path).setting == ("weights", str(tmp_path / file))


def test_own_exported_folder(tmp_path: Path) -> None:
    config = {"library_name": "bcos-train", "model_name": "resnet18", "model_args": {}, "num_classes": 1000}
    (tmp_path / "resnet18").mkdir()
    text = json.dumps({**config, "averaged": False, "sha256": "0123"})
    (tmp_path / "resnet18" / "config.json").write_text(text)
    found = find_own_weights("resnet18", tmp_path)
    assert found.setting == ("weights", str(tmp_path / "resnet18"))
    assert found.identity.endswith(" 0123")


@pytest.mark.parametrize("place", ["imagenet/resnet18", "resnet18"])
def test_own_run_is_the_latest_finished_one(place: str, tmp_path: Path) -> None:
    for name in ("old", "new", "unfinished"):
        run = tmp_path / place / name
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        if name != "unfinished":
            (run / "summary.json").write_text(name)
            time.sleep(0.02)
    assert find_own_weights("resnet18", tmp_path).setting == ("run", str(tmp_path / place / "new"))


def test_no_own_weights(tmp_path: Path) -> None:
    with pytest.raises(
        MissingWeights, match=r"resnet18\.safetensors, \.pth or \.ckpt, no exported folder resnet18 and no run$"
    ):
        find_own_weights("resnet18", tmp_path)
    run = tmp_path / "imagenet" / "resnet18" / "default-1"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(MissingWeights, match="1 runs have not finished"):
        find_own_weights("resnet18", tmp_path)


# ---- the evaluation


DOOR = """
import json, sys
from pathlib import Path
settings = dict(text.split("=", 1) for text in sys.argv[1:])
output = Path(settings["output"].strip("'"))
print("evaluating")
{code}
(output / "evaluation.json").write_text(json.dumps(settings))
"""


def door(folder: Path, code: str) -> Path:
    path = folder / "door.py"
    path.write_text(DOOR.format(code=code))
    return path


SOURCE = RowWeights("own", ("weights", "/weights/it's, {here}.pth"), "")


def test_evaluation_in_a_separate_process(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "rows" / "resnet18"
    content = evaluate_row(door(tmp_path, ""), "resnet18", SOURCE, Settings(data=data), place)
    assert content["model"] == "resnet18"
    assert (place / "evaluate.log").read_text() == "evaluating\n"


def test_evaluation_that_fails(data: Path, tmp_path: Path) -> None:
    path = door(tmp_path, "print('no room', file=sys.stderr); sys.exit(1)")
    with pytest.raises(EvaluationFailed, match=r"^no room \(exit code 1; "):
        evaluate_row(path, "resnet18", SOURCE, Settings(data=data), tmp_path / "row")


@pytest.mark.parametrize("code", ["sys.exit(130)", "import os; os.kill(os.getpid(), 15)"], ids=["exit", "signal"])
def test_evaluation_that_is_stopped(code: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate_row(door(tmp_path, code), "resnet18", SOURCE, Settings(data=data), tmp_path / "row")


def test_settings_are_quoted_for_hydra(data: Path, tmp_path: Path) -> None:
    """With special characters of Hydra in the paths."""
    odd = tmp_path / "a, b=[c] {d}'s: e"
    (odd / "val").mkdir(parents=True)
    settings = Settings(data=odd, limit=7, batch_size=3, device="cpu")
    overrides = evaluate_arguments("resnet18", SOURCE, settings, odd / "out")
    config = Composer(ROOT / "configs").compose("evaluate", overrides)
    assert config["model"]["name"] == "resnet18"
    assert config["dataset"]["_target_"] == "bcos_train.dataset.ImageNet"
    assert (config["dataset"]["root"], config["output"]) == (str(odd), str(odd / "out"))
    assert config["weights"] == SOURCE.setting[1]
    assert (config["limit_val"], config["batch_size"], config["trainer"]["accelerator"]) == (7, 3, "cpu")
    assert (
        Composer(ROOT / "configs").compose(
            "evaluate", evaluate_arguments("resnet18", SOURCE, Settings(data=data), odd)
        )["limit_val"]
        is None
    )


def test_settings_of_a_run(data: Path, tmp_path: Path) -> None:
    overrides = evaluate_arguments("resnet18", RowWeights("", ("run", "/runs/a"), ""), Settings(data=data), tmp_path)
    assert "run='/runs/a'" in overrides
    assert not any(text.startswith("model=") for text in overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "offical"}, "--weights offical: official, random or a folder, and this is not a folder"),
        ({"data": Path("/none")}, "--data /none: no such folder"),
        ({"data": Path(__file__).parent}, "it has no folder val/"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"limit": 0}, "--limit 0: at least 1"),
    ],
    ids=["weights", "no data folder", "no val", "batch size", "limit"],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        Settings(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
