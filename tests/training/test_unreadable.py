"""Runs with images that can't be read."""

import json
import signal
from pathlib import Path

import pytest

from bcos_train.config import UserError
from bcos_train.dataset import Digits
from bcos_train.dataset.storage.shard_writer import ShardOptions, write_shards
from bcos_train.dataset.storage.tar_index import index_tar
from bcos_train.run import evaluate, train

from .runs import TINY, assert_same_state, compose, final_state, metric_rows, run_folder, signal_at
from .test_shards import DIGITS, without_size, write_images


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Digits as image files, of which one in training and two in validation can't be read."""
    root = tmp_path_factory.mktemp("digits")
    digits = Digits(size=16, shots=6, val_per_class=3)
    write_images(digits.train(), root / "train")
    write_images(digits.val(), root / "val")
    broken = [*sorted((root / "train").rglob("*.png"))[17:18], *sorted((root / "val").rglob("*.png"))[4:6]]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    small = (text for text in without_size(TINY) if not text.startswith("limit_"))
    return (*small, *DIGITS, f"dataset.root={root}", "dataset.max_skipped=0.1")


@pytest.fixture(scope="module")
def whole(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    assert train(compose(runs, *overrides)) == 0
    return run_folder(runs)


def test_they_are_counted(whole: Path) -> None:
    rows = metric_rows(whole)
    assert [row["data/skipped"] for row in rows if row["data/skipped"]] == ["1", "1"]
    assert [float(row["val/skipped"]) for row in rows if row["val/skipped"]] == [2, 2]


def test_resume(whole: Path, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        assert train(compose(tmp_path, *overrides, "num_workers=2")) == 128 + signal.SIGTERM
    # Another limit doesn't make it another run.
    assert train(compose(tmp_path, *overrides, "dataset.max_skipped=0.2")) == 0
    assert_same_state(final_state(run_folder(tmp_path))["model"], final_state(whole)["model"])


def test_evaluation(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(tmp_path, name="evaluate") | {"run": str(whole), "output": str(tmp_path)}
    assert evaluate(config, ["run", "output"]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["count"], result["skipped"]) == (28, 2)
    assert "2 images can't be read, the scores are those of the others" in capsys.readouterr().out


def test_too_many_stop_the_run_in_one_line(overrides: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read the image .*\.png") as caught:
        train(compose(tmp_path, *overrides, "dataset.max_skipped=0"))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"^more than 1 of the validation images of imagefolder can't be read"
    ) as caught:
        train(compose(tmp_path, *overrides, "dataset.max_skipped=0.001", "num_workers=1"))
    assert "\n" not in str(caught.value)


def test_in_shards(overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that was damaged later has unreadable images, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(Digits(size=16, shots=6, val_per_class=3), tmp_path / "shards", ShardOptions(samples=20))
    path = tmp_path / "shards/train-000001.tar"
    sample = index_tar(path)[4]
    content = bytearray(path.read_bytes())
    content[sample.offset : sample.offset + 8] = bytes(8)
    path.write_bytes(content)
    others = tuple(text for text in overrides if not text.startswith("dataset.root"))
    shards = ("dataset.storage=shards", f"dataset.shards={tmp_path / 'shards'}")
    assert train(compose(tmp_path / "runs", *others, *shards)) == 0
    rows = metric_rows(run_folder(tmp_path / "runs"))
    assert [row["data/skipped"] for row in rows if row["data/skipped"]] == ["1", "1"]
