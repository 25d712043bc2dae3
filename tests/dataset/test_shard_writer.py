"""Shards written from a data set: contents, identical bytes, interruption, and their verification."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from bcos_train.dataset import Digits, ImageFolder
from bcos_train.dataset.storage.shard_check import verify_shards
from bcos_train.dataset.storage.shard_writer import (
    OtherShards,
    ShardOptions,
    write_shards,
)
from bcos_train.dataset.storage.tar_index import index_tar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Seven images per class and part, in several formats; one of them can't be read."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for n, suffix in enumerate(("jpg", "jpeg", "png", "webp", "bmp", "tif", "jpg")):
                pixels = rng.integers(0, 256, (9, 7 + n, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.{suffix}")
    (tmp_path / "images/train/b/1.jpeg").write_bytes(b"not an image")
    return tmp_path / "images"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_shards_have_the_same_pixels_and_labels(root: Path, tmp_path: Path) -> None:
    source = ImageFolder(root)
    manifest = write_shards(source, tmp_path / "out", ShardOptions(samples=4))
    shards = ImageFolder(None, storage="shards", shards=str(tmp_path / "out"))
    assert shards.class_names == ["a", "b"]
    files = [source.train()[i] for i in range(14) if i != 8]
    read = [shards.train()[i] for i in range(13)]
    assert [label for _, label in read] == [label for _, label in files]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(read, files, strict=True))
    assert len(shards.val()) == 14  # type: ignore[arg-type]
    (skipped,) = json.loads((tmp_path / "out/skipped.json").read_text())
    assert (skipped["index"], skipped["source"], skipped["shard"]) == (8, "train/b/1.jpeg", "train-000002.tar")
    assert "not an image" in skipped["reason"]
    train = manifest["parts"]["train"]  # type: ignore[index]
    assert (train["samples"], train["skipped"], len(train["shards"])) == (13, 1, 4)
    assert not (tmp_path / "out/.finished").exists()


def test_files_are_copied_unless_their_format_is_another(root: Path, tmp_path: Path) -> None:
    (root / "train/a/0.jpg").write_bytes((root / "train/a/4.bmp").read_bytes())  # a wrong name
    write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=100))
    tar = (tmp_path / "out/train-000000.tar").read_bytes()
    first, second = (tar[s.offset :][: s.length] for s in index_tar(tmp_path / "out/train-000000.tar")[:2])
    assert first.startswith(b"\x89PNG")
    assert second == (root / "train/a/1.jpeg").read_bytes()


def test_two_runs_write_identical_bytes_in_any_number_of_processes(root: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples=3, order="balanced")
    calls: list[tuple[int, int]] = []
    write_shards(ImageFolder(root), tmp_path / "one", options, on_shard=lambda *counts: calls.append(counts))
    write_shards(ImageFolder(root), tmp_path / "two", options, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert calls == [(n, 10) for n in range(11)]


def test_an_interrupted_run_continues(root: Path, tmp_path: Path) -> None:
    options = ShardOptions(samples=4)
    write_shards(ImageFolder(root), tmp_path / "whole", options)

    def interrupt(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(ImageFolder(root), out, options, on_shard=interrupt)
    assert not (out / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "val-000003.tar").write_bytes(b"half a shard, without a record")
    calls: list[int] = []
    write_shards(ImageFolder(root), out, options, on_shard=lambda done, _: calls.append(done))
    assert calls[0] == 3
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert contents(out) == contents(tmp_path / "whole")
    # A lost shard is written again, a complete set is left alone.
    (out / "train-000001.tar").unlink()
    for expected in ([7, 8], [8]):
        calls.clear()
        write_shards(ImageFolder(root), out, options, on_shard=lambda done, _: calls.append(done))
        assert calls == expected
        assert contents(out) == contents(tmp_path / "whole")


def test_balanced_order(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "train/b/0.jpg", root / "train/b/1.jpeg")
    write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=4, order="balanced"))
    for path in sorted((tmp_path / "out").glob("train-*.tar")):
        labels = [sample.label for sample in index_tar(path)]
        assert abs(labels.count(0) - labels.count(1)) <= 1
    keys = [sample.key for path in sorted((tmp_path / "out").glob("train-*.tar")) for sample in index_tar(path)]
    assert keys != sorted(keys)
    assert sorted(keys) == [f"{n:08d}" for n in range(14)]


def test_sizes_and_reencoding(root: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((60, 40, 3), dtype=np.uint8)).save(root / "train/a/0.jpg")
    write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(max_side=20, samples=100))
    read = ImageFolder(None, storage="shards", shards=str(tmp_path / "out")).train()
    assert read[0][0].size == (20, 30)
    assert read[2][0].size == (9, 9)  # smaller ones are copied
    manifest = write_shards(ImageFolder(root), tmp_path / "small", ShardOptions(megabytes=1))
    assert [len(part["shards"]) for part in manifest["parts"].values()] == [1, 1]  # type: ignore[attr-defined]


def test_plain_webdataset_reads_them(root: Path, tmp_path: Path) -> None:
    write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=10))
    urls = [str(path) for path in sorted((tmp_path / "out").glob("val-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["cls"] for sample in samples] == [0] * 7 + [1] * 7
    assert samples[8]["json"] == {"class": "b", "source": "val/b/1.jpeg"}
    assert next(samples[2][key] for key in ("jpg", "png") if key in samples[2]).size == (9, 9)


def test_images_that_are_not_files(tmp_path: Path) -> None:
    digits = Digits(size=8, shots=2, val_per_class=1)
    write_shards(digits, tmp_path / "out", ShardOptions())
    shards = ImageFolder(None, storage="shards", shards=str(tmp_path / "out"))
    assert shards.class_names == digits.class_names
    for i in range(20):
        (image, label), (expected, expected_label) = shards.train()[i], digits.train()[i]
        assert np.array_equal(image, expected)
        assert label == expected_label


def test_other_options_or_images_are_refused(root: Path, tmp_path: Path) -> None:
    write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=4))
    with pytest.raises(OtherShards, match="out has shards of other options"):
        write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=5))
    (root / "train/a/0.jpg").rename(root / "train/a/00.jpg")
    with pytest.raises(OtherShards, match="out has shards of other images"):
        write_shards(ImageFolder(root), tmp_path / "out", ShardOptions(samples=4))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.tar").touch()
    with pytest.raises(OtherShards, match=r"own has tar files without a manifest, such as mine.tar"):
        write_shards(ImageFolder(root), tmp_path / "own", ShardOptions(samples=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0: at least 1"),
        ({"quality": 100}, "quality=100: at most 95"),
        ({"order": "random"}, "order=random: dataset or balanced"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardOptions(**options)  # type: ignore[arg-type]


def test_verification(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shards(ImageFolder(root), out, ShardOptions(samples=4))
    assert verify_shards(out) == []
    content = bytearray((out / "val-000001.tar").read_bytes())
    content[600] ^= 1
    (out / "val-000001.tar").write_bytes(content)
    (out / "train-000000.tar").unlink()
    assert verify_shards(out) == [
        f"{out}/train-000000.tar: No such file or directory",
        f"{out}/val-000001.tar: its content is not that of the manifest",
    ]
    with pytest.raises(ValueError, match="no manifest of shards"):
        verify_shards(tmp_path)
