"""The command that writes shards; the writing itself is tested in tests/dataset/test_shard_writer.py."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bcos_train.dataset import ImageFolder
from bcos_train.dataset.storage import shard_writer

DIGITS = ("dataset=digits", "dataset.size=8", "dataset.shots=3", "dataset.val_per_class=2", "num_workers=1")


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *arguments])
    try:
        script.make_shards()
    except SystemExit as end:
        return int(str(end.code or 0))
    return 0


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_write_interrupt_and_verify(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*DIGITS, "samples=10", f"out={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "file_sha256", interrupt_at(4))
        assert call(script, monkeypatch, *command) == 130
    assert len(list((out / ".finished").glob("*.tar.json"))) == 3
    assert call(script, monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    assert "train: 30 samples in 3 shards, 0.00 GB" in printed
    assert "val: 20 samples in 2 shards" in printed
    assert len(ImageFolder(None, storage="shards", shards=str(out)).train()) == 30  # type: ignore[arg-type]
    assert call(script, monkeypatch, *command, "verify=true") == 0
    assert "are complete" in capsys.readouterr().out
    (out / "val-000001.tar").unlink()
    assert call(script, monkeypatch, *command, "verify=true") == 1
    assert "val-000001.tar: No such file" in capsys.readouterr().out


def interrupt_at(call_number: int) -> object:
    calls = iter(range(1, 100))
    original = shard_writer.file_sha256

    def sha256(path: Path) -> str:
        if next(calls) == call_number:
            raise KeyboardInterrupt
        return original(path)

    return sha256


def test_the_flag_verify(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.__file__ is not None
    monkeypatch.setattr(sys, "argv", [script.__file__, *DIGITS, f"out={tmp_path}", "--verify"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 2  # there is no manifest


def test_mistakes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (DIGITS, "out: needs a value"),
        ((*DIGITS, f"out={tmp_path / 'out'}", "samples=0"), "samples=0: at least 1"),
        ((*DIGITS, f"out={tmp_path / 'out'}", "verify=true"), "no manifest of shards"),
        (("dataset=imagefolder", f"dataset.root={tmp_path / 'none'}", f"out={tmp_path / 'out'}"), "there is no folder"),
    ):
        assert call(script, monkeypatch, *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.tar").touch()
    assert call(script, monkeypatch, *DIGITS, f"out={tmp_path / 'own'}") == 2
    assert "tar files without a manifest" in " ".join(capsys.readouterr().err.split())
