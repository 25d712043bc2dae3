"""The command that checks a data set; the check itself is tested in tests/dataset/test_verify.py."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verify_data.py", *arguments])
    try:
        script.verify_data()
    except SystemExit as end:
        return int(str(end.code or 0))
    return 0


def test_report_and_exit_code(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n, part in enumerate(("train", "val")):
        for k, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (3, 3), (n, k, 0)).save(tmp_path / part / name / "0.png")
    command = ["dataset=imagefolder", f"dataset.root={tmp_path}", "num_workers=0", f"output={tmp_path / 'out/r.json'}"]
    assert call(script, monkeypatch, *command) == 0
    assert "train: 2 images in 2 classes of 1 to 1; 0 unreadable, 0 copied" in capsys.readouterr().out
    (tmp_path / "val/a/0.png").write_bytes(b"text")
    assert call(script, monkeypatch, *command) == 1
    assert "cannot read the image" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/r.json").read_text())["problems"] == 1


def test_mistakes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script, monkeypatch, "dataset=imagefolder", f"dataset.root={tmp_path / 'none'}") == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert call(script, monkeypatch, f"output={tmp_path / 'file' / 'r.json'}") == 2
    assert "output: " in capsys.readouterr().err
