"""Evaluating gives the numbers that training logged."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bcos_train import commands
from bcos_train.config import UserError, save
from bcos_train.run import evaluate, rebase_on_run, train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import LAST, read_metrics

from .runs import TINY, compose, run_folder

#: An odd number of validation images; the best epoch isn't the last one.
SMALL = (*TINY, "trainer.max_epochs=3", "limit_train=24", "optimizer.lr=0.02")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train(compose(runs, *SMALL, "checkpointing.monitor=val/loss", "checkpointing.mode=min")) == 0
    return run_folder(runs)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train(compose(runs, *TINY, "limit_train=16", "trainer.max_epochs=1", "ema=null")) == 0
    return run_folder(runs)


def results(tmp_path: Path, *settings: str, base: Sequence[str] = (), **keys: Any) -> dict[str, Any]:
    """What ``evaluate.py`` with these settings writes; ``keys`` are settings whose values are paths."""
    config = compose(tmp_path, *base, *settings, name="evaluate")
    keys = {"output": str(tmp_path / "out"), **{key: str(value) for key, value in keys.items()}}
    assert evaluate({**config, **keys}, [*(text.partition("=")[0] for text in settings), *keys]) == 0
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return content


def logged(folder: Path, epoch: int, prefix: str) -> dict[str, float]:
    row = [row for row in read_metrics(folder / "metrics.csv") if f"{prefix}/loss" in row][epoch - 1]
    return {key: pytest.approx(row[f"{prefix}/{key}"], rel=1e-6) for key in ("loss", "acc1", "acc5")}


def best_epoch(folder: Path) -> int:
    return int(json.loads((folder / "checkpoints" / "best.json").read_text())[0]["epoch"])


@pytest.mark.parametrize(("settings", "prefix"), [((), "val_ema"), (("use_ema=false",), "val")], ids=["ema", "plain"])
@pytest.mark.parametrize("checkpoint", ["best", "last", "path"])
def test_numbers_of_a_run(checkpoint: str, settings: tuple[str, ...], prefix: str, run: Path, tmp_path: Path) -> None:
    epoch = 3 if checkpoint == "last" else best_epoch(run)
    assert best_epoch(run) != 3, "best and last must differ for this test to say something"
    given: Any = checkpoint
    if checkpoint == "path":
        given = run / "checkpoints" / json.loads((run / "checkpoints" / "best.json").read_text())[0]["file"]
    content = results(tmp_path, *settings, run=run, checkpoint=given)
    assert {key: content[key] for key in ("loss", "acc1", "acc5")} == logged(run, epoch, prefix)
    assert content["count"] == 21
    assert content["correct1"] == round(content["acc1"] * 21 / 100)
    assert content["ema"] == (prefix == "val_ema")
    assert content["model"] == "resnet20"
    assert content["dataset"] == "digits"
    assert (tmp_path / "out" / content["gallery"]).stat().st_size > 10_000


def test_results_go_into_the_run_folder(plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder)
    config = compose(tmp_path, name="evaluate")
    assert evaluate({**config, "run": str(folder)}, ["run"]) == 0
    content = json.loads((folder / "evaluation.json").read_text())
    assert {key: content[key] for key in ("loss", "acc1", "acc5")} == logged(plain_run, 1, "val")
    assert not content["ema"]
    assert (folder / "gallery.png").exists()
    out = capsys.readouterr().out
    assert f"{content['acc1']:.3f}" in out
    assert str(folder) in out.replace("\n", "")


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        pytest.param(("batch_size=5",), 21, id="batch size"),
        pytest.param(("limit_val=7",), 7, id="fewer images"),
        pytest.param(("num_workers=1", "trainer.precision=bf16"), 21, id="workers and precision"),
        pytest.param(("trainer.devices=2",), 21, id="devices: one process without a launcher"),
        pytest.param(("hydra.verbose=true",), 21, id="what is no key of the config"),
    ],
)
def test_settings_override_the_runs(settings: tuple[str, ...], count: int, run: Path, tmp_path: Path) -> None:
    keys = [text for text in settings if not text.startswith("hydra")]
    config = compose(tmp_path, *keys, name="evaluate")
    config |= {"run": str(run), "output": str(tmp_path)}
    assert evaluate(config, [text.partition("=")[0] for text in settings]) == 0
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["count"] == count
    if settings == ("batch_size=5",):
        assert {key: content[key] for key in ("loss", "acc1")}.items() <= logged(
            run, best_epoch(run), "val_ema"
        ).items()


def test_other_folder_of_images(plain_run: Path, tmp_path: Path) -> None:
    """Another data set, of which there is no training part."""
    generator = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "images" / "val" / str(label)).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "images" / "val" / str(label) / "image.png"
        )
    settings = ("dataset=imagefolder", f"dataset.root={tmp_path / 'images'}", "limit_val=null")
    content = results(tmp_path, *settings, run=plain_run)
    assert (content["dataset"], content["count"]) == ("imagefolder", 10)


# ---- weights without a run


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth in state_dict", "ckpt"])
def test_weights_files(kind: str, run: Path, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{kind.split()[0]}"
    if kind == "safetensors":
        shutil.copy(run / "model.safetensors", path)
    elif kind == "ckpt":
        path = run / "checkpoints" / LAST
    else:
        state = load_file(run / "model.safetensors")
        torch.save({"state_dict": state, "epoch": 3} if "in" in kind else state, path)
    content = results(tmp_path, "use_ema=false", base=TINY, weights=path)
    assert {key: content[key] for key in ("loss", "acc1", "acc5")} == logged(run, 3, "val")
    if kind == "ckpt":
        content = results(tmp_path, base=TINY, weights=path)
        assert {key: content[key] for key in ("loss", "acc1", "acc5")} == logged(run, 3, "val_ema")


def test_exported_average(run: Path, tmp_path: Path) -> None:
    content = results(tmp_path, base=TINY, weights=run / "model_ema.safetensors")
    assert {key: content[key] for key in ("loss", "acc1", "acc5")} == logged(run, 3, "val_ema")


# ---- mistakes


def mistake(tmp_path: Path, *settings: str, **keys: Any) -> str:
    config = compose(tmp_path, *TINY, *settings, name="evaluate")
    with pytest.raises(UserError) as caught:
        evaluate({**config, **{key: str(value) for key, value in keys.items()}}, [*keys])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_to_evaluate(tmp_path: Path, plain_run: Path) -> None:
    assert mistake(tmp_path).startswith("nothing to evaluate: give run=<run folder>, or model=")
    message = mistake(tmp_path, run=plain_run, weights=plain_run / "model.safetensors")
    assert message == "give run=<run folder> or weights=<path>, not both"


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    assert "no such folder" in mistake(tmp_path, run=tmp_path / "none")
    shutil.copy(Path(__file__), tmp_path / "config.yaml")
    assert "config.yaml: not a config" in mistake(tmp_path, run=tmp_path)


def test_checkpoints_that_are_not_there(tmp_path: Path, plain_run: Path) -> None:
    assert mistake(tmp_path, run=plain_run, checkpoint="bset").startswith("checkpoint=bset: no such file")
    folder = tmp_path / "run"
    shutil.copytree(plain_run, folder)
    (folder / "checkpoints" / LAST).write_bytes(b"x")
    assert "is damaged" in mistake(tmp_path, run=folder, checkpoint="last")
    shutil.rmtree(folder / "checkpoints")
    assert "no best checkpoint" in mistake(tmp_path, run=folder)
    assert "no checkpoint in" in mistake(tmp_path, run=folder, checkpoint="last")


def test_average_that_is_not_there(tmp_path: Path, plain_run: Path) -> None:
    message = mistake(tmp_path, "use_ema=true", run=plain_run)
    assert message.endswith("holds no averaged weights, only the plain ones")
    message = mistake(tmp_path, "use_ema=true", weights=plain_run / "model.safetensors")
    assert message.endswith("holds the plain weights, not the averaged ones")


NO_SAFETENSORS = "is not a safetensors file"
NO_STATE, NO_FILE = "is not a state dict of tensors", "is not a weights file, or only part of one"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        pytest.param("w.safetensors", lambda p: p.write_bytes(b"x" * 99), NO_SAFETENSORS, id="safetensors"),
        pytest.param("w.pth", lambda p: p.write_bytes(b"x" * 99), NO_FILE, id="bytes"),
        pytest.param("w.pth", lambda p: torch.save([1, 2], p), NO_STATE, id="list"),
        pytest.param("w.pth", lambda p: torch.save({}, p), NO_STATE, id="empty"),
        pytest.param("w.pth", lambda p: torch.save({"a": 1}, p), NO_STATE, id="numbers"),
        pytest.param(
            "w.pth", lambda p: torch.save({"a": torch.nn.Linear(1, 1)}, p), "holds a Python object", id="objects"
        ),
        pytest.param("w.ckpt", lambda p: p.write_bytes(b"x" * 99), NO_FILE, id="bytes in a checkpoint"),
        pytest.param(
            "w.ckpt", lambda p: torch.save({"model": {}}, p), "has no w.ckpt.sha256 beside it", id="no digest"
        ),
        pytest.param("w.ckpt", lambda p: files.save({"optimizer": {}}, p), "holds no model", id="no model"),
    ],
)
def test_files_that_are_no_weights(name: str, write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert message in mistake(tmp_path, weights=tmp_path / name)


def test_weights_of_another_model(tmp_path: Path, plain_run: Path) -> None:
    path = plain_run / "model.safetensors"
    assert mistake(tmp_path, weights=tmp_path / "none.pth") == f"weights={tmp_path / 'none.pth'}: no such file"
    assert mistake(tmp_path, "model=resnet32", weights=path) == f"{path} holds weights of resnet20, not of resnet32"
    shutil.copy(path, tmp_path / "w.safetensors")  # where nothing is known about them
    message = mistake(tmp_path, "model.max_out=1", weights=tmp_path / "w.safetensors")
    assert "conv1.linear.weight has the shape (32, 6, 3, 3), the model (16, 6, 3, 3)" in message


@pytest.mark.parametrize("part", ["", "model.safetensors", "checkpoints/last.ckpt"])
def test_weights_of_the_model_with_other_options(part: str, tmp_path: Path, plain_run: Path) -> None:
    """They have the same shapes: nothing but the run's config tells that this is another function."""
    path = plain_run / part
    told = f"weights={path} were trained with b=2, the model has b=1.5: set b=2 (on the command line model.b=2)"
    told += "; if the difference is intended, use a bare weights file, as written by scripts/export_weights.py (.pth)"
    assert mistake(tmp_path, "model.b=1.5", weights=path) == told
    config = compose(tmp_path / "runs", *TINY, "model.b=1.5")
    config["model"]["weights"] = str(path)
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value) == f"model: {told}"
    assert not (tmp_path / "runs").exists()


def _run_on_images(folder: Path, root: Path, dataset: str = "imagefolder", **values: object) -> Path:
    """Write the config of a run on image folders."""
    config = compose(folder, f"dataset={dataset}", f"dataset.root={root}", "explanation=none")
    (folder / "checkpoints").mkdir(parents=True)
    save({**config, **values}, folder / "config.yaml")
    return folder


def _evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[Any]]:
    seen: list[Any] = []
    monkeypatch.setattr("bcos_train.run.evaluate", lambda config, keys: seen.append(rebase_on_run(config, keys)))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    try:
        commands.evaluate()
    except SystemExit as stop:
        return int(str(stop.code)), seen
    return 0, seen


def test_keys_beside_a_run_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_on_images(tmp_path / "run", tmp_path, explanation=None)
    code, seen = _evaluate(monkeypatch, f"run={run}", "dataset.root=/other", "dataset.val=test")
    assert (code, capsys.readouterr().err) == (0, "")
    assert (seen[0]["dataset"]["root"], seen[0]["dataset"]["val"]) == ("/other", "test")
    code, seen = _evaluate(
        monkeypatch, f"run={run}", "+dataset.val=test", "++model.b=1.5", "dataset.class_map={a b: 0}"
    )
    assert (code, capsys.readouterr().err) == (0, "")
    assert (seen[0]["dataset"]["val"], seen[0]["model"]["b"]) == ("test", 1.5)
    assert seen[0]["dataset"]["class_map"] == {"a b": 0}
    mistakes = {
        "dataset.size=8": "dataset.size=8: unknown key (allowed: root, train, val, cache,",
        "explanation.n_images=5": "explanation.n_images: explanation is null in the run, so it has no keys",
        "+dataset.vall=test": "dataset.vall=test: unknown key; did you mean val?",
    }
    for text, message in mistakes.items():
        assert _evaluate(monkeypatch, f"run={run}", text) == (2, [])
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "recipe=long",
            "recipe=long: has no effect beside run=…, whose settings apply; set single keys of the evaluation",
        ),
        ("loss=cross_entropy", "loss=cross_entropy: has no effect beside run=…"),
        ("+optimizer.lr=1", "optimizer.lr=1: has no effect beside run=…"),
        ("~dataset.root", "~dataset.root: nothing can be deleted beside run=…; set a value, such as null"),
        ("~explanation", "~explanation: nothing can be deleted beside run=…"),
    ],
)
def test_what_has_no_effect_beside_a_run(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(monkeypatch, f"run={tmp_path}", text) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (_run_on_images(tmp_path / name, tmp_path / f"images-{name}") for name in "ab")
    sweep = ("-m", f"run={a},{b}", f"hydra.sweep.dir={tmp_path}")
    code, seen = _evaluate(monkeypatch, *sweep, "dataset.val=test")
    assert (code, capsys.readouterr().err) == (0, "")
    assert [config["run"] for config in seen] == [str(a), str(b)]
    assert [config["dataset"]["root"] for config in seen] == [str(tmp_path / "images-a"), str(tmp_path / "images-b")]
    for text in ("dataset.vall=test", "recipe=long", "~dataset.val"):
        assert _evaluate(monkeypatch, *sweep, text) == (2, [])
        assert capsys.readouterr().err.startswith(text)


def test_what_is_no_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run_on_images(tmp_path / "run", tmp_path)
    (last := run / "checkpoints" / LAST).touch()
    for path, message in {
        last: f"a file, expected the run folder: run={run} checkpoint={last}",
        run / "config.yaml": f"a file, expected the run folder: run={run}",
        run / "checkpoints": f"not a run folder, since it has no config.yaml; did you mean run={run}?",
        tmp_path / "none": "no such folder",
    }.items():
        assert _evaluate(monkeypatch, f"run={path}") == (2, [])
        assert capsys.readouterr().err == f"run={path}: {message}\n"


@pytest.mark.parametrize(("dataset", "variable"), [("imagefolder", "DATA_ROOT"), ("imagenet", "IMAGENET_PATH")])
def test_a_moved_data_set(dataset: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment, and that over the run."""
    run = _run_on_images(tmp_path / "run", tmp_path, dataset)
    for name in ("DATA_ROOT", "IMAGENET_PATH"):
        monkeypatch.delenv(name, raising=False)

    config = {**compose(tmp_path, f"dataset={dataset}", "dataset.root=/own", name="evaluate"), "run": str(run)}

    def root(*keys: str) -> object:
        return rebase_on_run(config, ["run", *keys])["dataset"]["root"]

    assert root() == str(tmp_path)
    monkeypatch.setenv(variable, "/moved")
    assert root() == "/moved"  # although the run's folder exists
    assert root("dataset.root") == root("dataset") == root("dataset", "dataset.root") == "/own"
    monkeypatch.setenv(variable, "")
    assert root() == str(tmp_path)


def test_a_missing_data_set_names_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_run: Path) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "none"))
    config = compose(tmp_path, "dataset=imagefolder", name="evaluate")
    with pytest.raises(UserError, match=r"there is no folder .*none: set DATA_ROOT or dataset.root"):
        evaluate({**config, "run": str(plain_run)}, ["run", "dataset"])
