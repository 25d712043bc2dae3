"""Runs on shards equal those on image files bit for bit, wherever they are stopped, in one and two processes."""

import signal
from pathlib import Path

import pytest

from bcos_train.dataset import Digits, ImageFolder
from bcos_train.dataset.base import ImageDataset
from bcos_train.dataset.storage.shard_writer import ShardOptions, write_shards
from bcos_train.run import train

from .runs import TINY, assert_same_state, compose, final_state, metric_rows, run_folder, signal_at
from .test_ddp import SELF_START, SMALL, start

#: As for digits, whose images these are.
DIGITS = (
    "dataset=imagefolder",
    "augmentation=crop_flip",
    "augmentation.train.size=16",
    "augmentation.train.padding=2",
    "trainer.gradient_clip_val=null",
    "schedule.warmup_epochs=null",
    "loss=bce",
    "dataset.exif_orientation=true",
)


def without_size(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in overrides if not text.startswith("dataset.size"))


def write_images(images: ImageDataset, folder: Path) -> None:
    for index in range(len(images)):  # type: ignore[arg-type]
        image, label, *_ = images[index]
        path = folder / f"class{label}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


@pytest.fixture(scope="module")
def storages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """The overrides of each storage of the same images."""
    root = tmp_path_factory.mktemp("digits")
    digits = Digits(size=16, shots=6, val_per_class=4)
    write_images(digits.train(), root / "files/train")
    write_images(digits.val(), root / "files/val")
    write_shards(ImageFolder(root / "files"), root / "shards", ShardOptions(samples=7))
    return {
        "files": (f"dataset.root={root / 'files'}",),
        "shards": ("dataset.storage=shards", f"dataset.shards={root / 'shards'}"),
    }


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def from_files(storages: dict[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("files")
    assert train(compose(runs, *without_size(TINY), *DIGITS, *storages["files"])) == 0
    return run_folder(runs)


def assert_same_training(one: Path, other: Path) -> None:
    assert metric_rows(one) == metric_rows(other)
    assert_same_state(final_state(one)["model"], final_state(other)["model"])


@pytest.mark.parametrize("workers", [0, 2])
def test_same_training(workers: int, storages: dict[str, tuple[str, ...]], from_files: Path, tmp_path: Path) -> None:
    overrides = (*without_size(TINY), *DIGITS, *storages["shards"], f"num_workers={workers}")
    assert train(compose(tmp_path, *overrides)) == 0
    assert_same_training(run_folder(tmp_path), from_files)


def test_resume(
    storages: dict[str, tuple[str, ...]], from_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*without_size(TINY), *DIGITS, *storages["shards"])
    for batch in (1, 4):
        with monkeypatch.context() as patch:
            signal_at(patch, batch)
            assert train(compose(tmp_path, *overrides)) == 128 + signal.SIGTERM
    assert train(compose(tmp_path, *overrides)) == 0
    assert_same_training(run_folder(tmp_path), from_files)


@pytest.mark.slow
def test_two_processes(storages: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    overrides = (*without_size(SMALL), *DIGITS, "optimizer=sgd", "num_workers=1")
    for name, storage in storages.items():
        texts = [f"++{text}" if "." in text.partition("=")[0] else text for text in (*overrides, *storage)]
        result = start(SELF_START, *texts, f"runs={tmp_path / name}")
        assert result.returncode == 0, result.stderr[-3000:]
    assert_same_training(run_folder(tmp_path / "shards"), run_folder(tmp_path / "files"))
