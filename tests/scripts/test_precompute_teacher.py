"""The command that computes a teacher's maps; the computation itself is tested in tests/training/test_frozen.py."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from bcos_train.distillation.store import Store

COMMAND = (
    "dataset.size=16",
    "limit_train=6",
    "limit_val=4",
    "batch_size=4",
    "augmentation=plain",
    "trainer.accelerator=cpu",
    "distillation.teacher=resnet20",
    "distillation.teacher_weights=random",
)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["precompute_teacher.py", *arguments])
    try:
        script.precompute_teacher()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_ctrl_c_and_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, written = [*COMMAND, f"out={tmp_path / 'maps'}"], Store.write

    def write(store: Store, part: str, *arguments: object) -> None:
        if part == "val":
            raise KeyboardInterrupt
        written(store, part, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        assert call(script, monkeypatch, *command) == 130
    assert call(script, monkeypatch, *command) == 0
    assert "missing are 1 with" in capsys.readouterr().out
    assert Store.open(tmp_path / "maps").manifest.parts["train"].count == 6


def test_mistakes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script, monkeypatch, *COMMAND) == 2
    assert "out: needs a value" in capsys.readouterr().err
    assert call(script, monkeypatch, f"out={tmp_path / 'maps'}") == 2
    assert "distillation.teacher: needs a value" in capsys.readouterr().err
    assert call(script, monkeypatch, *COMMAND, f"out={tmp_path / 'maps'}", "szie=3") == 2
    assert "szie" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.jpg").write_bytes(b"")
    assert call(script, monkeypatch, *COMMAND, f"out={tmp_path / 'full'}") == 2
    assert "the folder holds other files (photo.jpg): choose an empty one" in capsys.readouterr().err
