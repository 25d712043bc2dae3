"""The script: what it takes, says and returns."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bcos_train import create_model, load


@pytest.fixture
def source(tmp_path: Path) -> str:
    torch.save(create_model("resnet20", num_classes=3).state_dict(), tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def test_folder(script: ModuleType, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    target = tmp_path / "out"
    options = ["--license", "mit", "--classes", str(tmp_path / "names.txt")]
    assert script.main([source, str(target), "--model", "resnet20", "b=1.25", "logit_bias=-1e-1", *options]) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["model_args"]["b"] == 1.25
    assert config["model_args"]["logit_bias"] == -0.1
    assert config["label_names"] == ["cat", "dog", "bird"]
    assert load(target).model.num_classes == 3
    captured = capsys.readouterr()
    assert f"written: {target}" in captured.out
    assert captured.err == ""


def test_hash(script: ModuleType, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([source, str(tmp_path / "a.pth"), "--model", "resnet20", "--hash"]) == 0
    (written,) = tmp_path.glob("a-*.pth")
    assert f"sha256 of the weights: {written.stem.removeprefix('a-')}" in capsys.readouterr().out


def test_onnx(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}")
    torch.manual_seed(0)
    torch.save(create_model("plain_cnn9", num_classes=3, logit_bias=0.0).state_dict(), tmp_path / "w.pth")
    target = tmp_path / "m.onnx"
    options = ["--model", "plain_cnn9", "logit_bias=0.0", "--image-size", "16"]
    assert script.main([str(tmp_path / "w.pth"), str(target), *options]) == 0
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.out.splitlines()[1:]] == ["written", "sha256 of the file"]
    assert captured.err == ""
    assert target.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SOURCE, TARGET\n"),
        (["{w}"], "the following arguments are required: TARGET\n"),
        (["", "{out}"], "SOURCE is empty"),
        (["{w}", ""], "TARGET is empty"),
        (["{w}", "{out}", "--ema=1"], "--ema/--no-ema takes no value, got '1'"),
        (["{w}", "{out}", "--model", "resnet20", "b=1", "b=2"], "b is set twice: 1 and 2"),
        (["{w}", "{out}", "--modle", "resnet20"], "no such option; did you mean --model?"),
        (["{w}", "{out}", "resnet20"], "resnet20: model options are given as KEY=VALUE"),
        (["{w}", "{out}", "--model", "resnet2"], "unknown model 'resnet2'"),
        (["{w}", "{out}", "--model", "resnet20", "--classes", "nowhere"], "can't read --classes nowhere"),
        (["{w}", "{w}", "--model", "resnet20"], "--force to overwrite it"),
    ],
    ids=[
        "nothing",
        "no target",
        "empty source",
        "empty target",
        "value of a flag",
        "twice",
        "option",
        "no pair",
        "model",
        "classes",
        "target",
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    script: ModuleType,
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [text.format(w=source, out=tmp_path / "out") for text in arguments]
    assert script.main(argv) == script.MISTAKE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
