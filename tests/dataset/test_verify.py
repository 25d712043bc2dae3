"""What the check of a data set finds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bcos_train.dataset import Digits, ImageFolder
from bcos_train.dataset.storage.shard_writer import ShardOptions, write_shards
from bcos_train.dataset.verify import verify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Different images, three of class a and four of class b in each part."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, count in (("a", 3), ("b", 4)):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{n}.png")
    return tmp_path


def check(source: Any, workers: int = 0) -> Any:
    return verify(source, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_data_set(workers: int, root: Path) -> None:
    report = check(ImageFolder(root), workers)
    assert report["problems"] == report["n_overlap"] == 0
    for part in report["parts"].values():
        assert (part["images"], part["classes"]) == (7, {"a": 3, "b": 4})
        assert part["unreadable"] == part["duplicates"] == []


def test_each_kind_of_problem(root: Path) -> None:
    (root / "train/a/0.png").write_bytes(b"")
    (root / "train/a/1.png").write_bytes((root / "train/a/1.png").read_bytes()[:50])
    (root / "val/b/3.png").unlink()
    (root / "val/b/3.png").symlink_to("nowhere")
    shutil.copy(root / "train/b/1.png", root / "train/b/copy.png")
    # The same pixels in another file.
    with Image.open(root / "train/b/2.png") as image:
        image.save(root / "val/a/other.bmp")
    report = check(ImageFolder(root), workers=1)
    train, val = report["parts"]["train"], report["parts"]["val"]
    assert [entry["image"] for entry in train["unreadable"]] == [f"{root}/train/a/{n}.png" for n in (0, 1)]
    assert "it is empty" in train["unreadable"][0]["problem"]
    assert [entry["image"] for entry in val["unreadable"]] == [f"{root}/val/b/3.png"]
    assert train["duplicates"] == [[f"{root}/train/b/1.png", f"{root}/train/b/copy.png"]]
    assert report["overlap"] == [{"train": [f"{root}/train/b/2.png"], "val": [f"{root}/val/a/other.bmp"]}]
    assert report["problems"] == 2 + 1 + 1 + 1
    assert train["classes"] == {"a": 1, "b": 5}


def test_shards_subsets_and_images_that_are_not_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(root / "train/b/1.png", root / "val/b/copy.png")
    write_shards(ImageFolder(root), tmp_path / "shards", ShardOptions())
    report = check(ImageFolder(None, storage="shards", shards=str(tmp_path / "shards")))
    (overlap,) = report["overlap"]
    assert overlap["train"] == [f"{tmp_path}/shards/train-000000.tar:00000004"]
    report = check(ImageFolder(root, shots=2))
    assert report["parts"]["train"]["images"] == 4
    digits = check(Digits(size=8, shots=2, val_per_class=2))
    assert digits["parts"]["val"]["classes"] == {str(n): 2 for n in range(10)}


def test_progress(root: Path) -> None:
    calls: list[tuple[int, int]] = []
    verify(ImageFolder(root), on_images=lambda *counts: calls.append(counts))
    assert calls == [(14, 14)]
