"""Every mistake in exporting is one line, and leaves no files."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train import create_model, load
from bcos_train.weights import export as export_module
from bcos_train.weights.export import export
from bcos_train.weights.files import read_weights, save_weights

from .exports import State, assert_equal, state_in, training_checkpoint
from .release import state_of


def bad_shape(folder: Path) -> str:
    state = state_of("resnet20")
    state["conv1.linear.weight"] = state["conv1.linear.weight"][:, :3]
    torch.save(state, folder / "w.pth")
    return str(folder / "w.pth")


def not_finite(folder: Path) -> str:
    state = state_of("resnet20")
    state["conv1.linear.weight"][0] = torch.nan
    torch.save(state, folder / "w.pth")
    return str(folder / "w.pth")


def plain_only(folder: Path) -> str:
    torch.save(training_checkpoint(state_of("resnet18")), folder / "w.ckpt")
    return str(folder / "w.ckpt")


def good(folder: Path) -> str:
    torch.save(state_of("resnet20"), folder / "w.pth")
    return str(folder / "w.pth")


def pickled(folder: Path) -> str:
    torch.save({"args": 1, "net": argparse.Namespace(a=1)}, folder / "w.ckpt")
    return str(folder / "w.ckpt")


def without_digest(folder: Path) -> str:
    torch.save({"model": state_of("resnet20")}, folder / "w.ckpt")
    return str(folder / "w.ckpt")


def text(folder: Path) -> str:
    (folder / "w.pth").write_text("no weights")
    return str(folder / "w.pth")


def unfinished(folder: Path) -> str:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("model: {name: resnet20}")
    return str(folder / "run")


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        (lambda folder: "nowhere.pth", {}, "nowhere.pth: no such file, folder or model"),
        (lambda folder: "resnet5", {}, "resnet5: no such file, folder or model; did you mean resnet50?"),
        (lambda folder: "official:resnet5", {}, "unknown model 'resnet5'; did you mean resnet50?"),
        (lambda folder: "official:resnet50", {"use_ema": True}, "have no averaged ones: use_ema=false"),
        (good, {"model": None}, "w.pth doesn't specify its model: set --model NAME"),
        (good, {"model": "resnet2O"}, "unknown model 'resnet2O'; did you mean resnet20?"),
        (good, {"model": "timm:resnet1O"}, "unknown timm model 'resnet1O'; did you mean"),
        (good, {"options": {"maxout": 2}}, "resnet20 has no option 'maxout'; did you mean max_out?"),
        (good, {"options": {"max_out": "two"}}, "build resnet20 with max_out=two (max_out: expected a number)"),
        (good, {"options": {"num_classes": 7}}, "doesn't fit the model: fc.linear.weight has the shape"),
        (good, {"use_ema": True}, "w.pth holds no averaged weights, only the plain ones"),
        (good, {"license": "my own: do not share"}, "share': must be an identifier of the Hugging Face Hub"),
        (good, {"class_names": ["a"]}, "1 class names, but the model has 10 classes"),
        (good, {"target": "out.pt"}, "not .pt; did you mean .pth?"),
        (good, {"target": "out.ckpt"}, "a target is a .pth, .safetensors or .onnx file or a folder, not .ckpt"),
        (good, {"with_hash": True}, "--hash needs a file"),
        (bad_shape, {}, "conv1.linear.weight has the shape (32, 3, 3, 3), the model (32, 6, 3, 3)"),
        (not_finite, {}, "conv1.linear.weight holds values that are not finite"),
        (plain_only, {"use_ema": True}, "w.ckpt holds no averaged weights, only the plain ones"),
        (plain_only, {"model": "resnet34"}, "doesn't fit the model"),
        (pickled, {}, "w.ckpt holds a Python object (argparse.Namespace), and reading that could run code"),
        (without_digest, {}, "w.ckpt has no w.ckpt.sha256 beside it"),
        (text, {}, "w.pth is not a weights file"),
        (unfinished, {}, "the run has not finished, so there is no model.safetensors; use a checkpoint, such as"),
    ],
)  # fmt: skip
def test_mistakes(source: Callable[[Path], str], keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"model": "resnet20", "target": "deep/out", **keys}
    if (source is plain_only and "model" not in keys) or source is unfinished:
        given["model"] = None
    path = source(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        export(path, tmp_path / given.pop("target"), **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["w.pth", "w.safetensors", "folder"])
def test_nothing_is_overwritten_without_force(target: str, trained_run: Path, tmp_path: Path) -> None:
    path = tmp_path / target
    if path.suffix:
        path.write_text("precious")
    else:
        path.mkdir()
        (path / "README.md").write_text("precious")
        (path / "notes.txt").write_text("mine")
    held = path if path.suffix else path / "README.md"
    with pytest.raises(ValueError, match=r"exists.*--force"):
        export(str(trained_run), path)
    assert held.read_text() == "precious"
    export(str(trained_run), path, force=True)
    assert_equal(read_weights(path)[0], state_in(trained_run, True))
    assert path.suffix or (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["", "model.safetensors"], ids=["the run folder", "its weights"])
def test_nothing_is_written_into_a_run_folder(target: str, trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    with pytest.raises(ValueError, match="choose another place"):
        export(str(folder), folder / target if target else folder, force=True)
    assert_equal(state_in(folder, False), state_in(trained_run, False))


def test_onto_itself(tmp_path: Path) -> None:
    """The source is still open when it is replaced."""
    torch.save(state_of("resnet20"), tmp_path / "w.pth")
    export(str(tmp_path / "w.pth"), tmp_path / "w.pth", model="resnet20", force=True)
    assert_equal(read_weights(tmp_path / "w.pth")[0], state_of("resnet20"))


@pytest.mark.parametrize("target", ["w.pth", "w.safetensors", "folder"])
def test_a_file_that_differs_after_reading_it_back(
    target: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any) -> tuple[State, bool]:
        state, is_ema = read_weights(*args)
        return {key: value + 1 for key, value in state.items()}, is_ema

    monkeypatch.setattr(export_module, "read_weights", lambda path, use_ema: changed(path, use_ema))
    with pytest.raises(ValueError, match="differs after reading it back"):
        export(str(trained_run), tmp_path / "deep" / target)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.os, "fsync", full)
    with pytest.raises(ValueError, match=r"can't write .*: No space left on device"):
        export(str(trained_run), tmp_path / "a" / "b" / "w.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such file, folder or model"),
        (lambda folder: (folder / "config.json").unlink(), "doesn't specify its model"),
        (lambda folder: (folder / "config.json").write_text("{}"), "doesn't specify its model"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't read "),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: save_weights(create_model("resnet20"), folder / "model.safetensors"), "its SHA-256 differs"),
    ],
    ids=["no folder", "no config", "another config", "damaged config", "no weights", "other weights"],
)
def test_loading_a_broken_export(
    change: Callable[[Path], Any], message: str, trained_run: Path, tmp_path: Path
) -> None:
    export(str(trained_run), tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["", "model.safetensors"], ids=["folder", "file"])
def test_weights_that_an_export_does_not_describe(part: str, trained_run: Path, tmp_path: Path) -> None:
    export(str(trained_run), tmp_path / "out")
    save_weights(create_model("resnet20"), tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        create_model("resnet20", weights=tmp_path / "out" / part)
