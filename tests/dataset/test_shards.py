"""Images in shards: where they are found, their labels, and what happens when a shard changes."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from bcos_train.dataset import Cifar10, ImageFolder, ImageNet, UnreadableImage
from bcos_train.dataset.storage import shards as module
from bcos_train.dataset.storage.shards import ShardImages, Shards, find_shards
from bcos_train.dataset.storage.tar_index import BadShard


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/bcos-train/shards"


def encoded(shade: int) -> bytes:
    path = Path(os.environ["XDG_CACHE_HOME"]) / "image.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(path)
    return path.read_bytes()


def write(pattern: Path, samples: Iterator[dict[str, object]] | list[dict[str, object]], per_shard: int = 2) -> None:
    """Write shards as a user of webdataset does."""
    pattern.parent.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(pattern), maxcount=per_shard, verbose=0) as writer:
        for n, sample in enumerate(samples):
            writer.write({"__key__": f"{n:04d}", "png": encoded(n), **sample})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five training and three validation images of three classes, two in each shard."""
    write(tmp_path / "own/train-%06d.tar", [{"cls": n % 3} for n in range(5)])
    write(tmp_path / "own/val-%06d.tar", [{"cls": n} for n in range(3)])
    return tmp_path / "own"


def shades(images: object) -> list[tuple[int, int]]:
    """Red value and label of each image."""
    return [(images[i][0].getpixel((0, 0))[0], images[i][1]) for i in range(len(images))]  # type: ignore[index,arg-type]


def from_shards(shards: object) -> ImageFolder:
    return ImageFolder(None, storage="shards", shards=shards)  # type: ignore[arg-type]


def test_a_folder_and_patterns(folder: Path) -> None:
    expected = [(n, n % 3) for n in range(5)]
    assert shades(from_shards(str(folder)).train()) == expected
    for pattern in (f"{folder}/train-{{000000..000002}}.tar", f"{folder}/train-*.tar"):
        source = from_shards({"train": pattern, "val": f"{folder}/val-*.tar"})
        assert source.class_names == ["0", "1", "2"]
        assert shades(source.train()) == expected
        assert shades(source.val()) == [(0, 0), (1, 1), (2, 2)]


def test_class_names_as_text(tmp_path: Path) -> None:
    write(tmp_path / "own/train-%d.tar", [{"cls": name} for name in ("dog", "cat", "dog")])
    write(tmp_path / "own/val-%d.tar", [{"json": {"class": name}} for name in ("dog", "cat")])
    source = from_shards(str(tmp_path / "own"))
    assert source.class_names == ["cat", "dog"]
    assert shades(source.train()) == [(0, 1), (1, 0), (2, 1)]
    assert shades(source.val()) == [(0, 1), (1, 0)]
    write(tmp_path / "own/train-%d.tar", [{"cls": "cow"}])
    with pytest.raises(ValueError, match=r"train-0.tar:0000: unknown class 'cow'"):
        from_shards(str(tmp_path / "own")).train()


def test_cifar10_and_imagenet(folder: Path, tmp_path: Path) -> None:
    assert Cifar10(None, storage="shards", shards=str(folder)).train().labels.tolist() == [0, 1, 2, 0, 1]  # type: ignore[attr-defined]
    write(tmp_path / "wnids/train-%d.tar", [{"cls": "n01440764"}, {"cls": "n15075141"}])
    write(tmp_path / "wnids/val-%d.tar", [{"cls": 999}])
    source = ImageNet(None, storage="shards", shards=str(tmp_path / "wnids"))
    source.prepare()
    assert source.train().labels.tolist() == [0, 999]  # type: ignore[attr-defined]
    assert source.class_names[source.val()[0][1]] == "toilet tissue"
    write(tmp_path / "wnids/val-%d.tar", [{"cls": 1000}])
    with pytest.raises(ValueError, match=r"val-0.tar:0000: class 1000, the data set has 1000 classes"):
        ImageNet(None, storage="shards", shards=str(tmp_path / "wnids")).val()


def test_incomplete_samples_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "own/train-%d.tar", [{"cls": 0}, {"txt": "no class"}, {"cls": 1}])
    write(tmp_path / "own/val-%d.tar", [{"cls": 0}, {"cls": 1}])
    assert shades(from_shards(str(tmp_path / "own")).train()) == [(0, 0), (2, 1)]
    assert "left out 1 samples without an image or a class" in caplog.text


def test_the_index_is_read_once(folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    index_tar = module.index_tar
    monkeypatch.setattr(module, "index_tar", lambda path: read.append(path) or index_tar(path))
    first = from_shards(str(folder)).train()
    assert len(read) == 5  # of both parts, since the class names are those of the validation part
    again = from_shards(str(folder)).train()
    assert len(read) == 5
    assert first.digest() == again.digest()  # type: ignore[attr-defined]
    os.utime(folder / "train-000001.tar", ns=(1, 1))
    from_shards(str(folder)).train()
    assert len(read) == 8
    for path in cache_folder.iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    assert shades(from_shards(str(folder)).train())[-1] == (4, 1)


def test_without_a_place_for_the_index(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert len(from_shards(str(folder)).train()) == 5  # type: ignore[arg-type]
    assert "the index of the shards could not be kept" in caplog.text


def test_indexing_in_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_SHARDS_FOR_PROCESSES", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert shades(from_shards(str(folder)).train()) == [(n, n % 3) for n in range(5)]


def test_worker_processes_and_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_OPEN", 1)
    images = from_shards(str(folder)).train()
    assert isinstance(images, ShardImages)
    expected = shades(images)
    assert len(images._files) == 1
    copy = pickle.loads(pickle.dumps(images))
    assert not copy._files
    assert shades(copy) == expected
    loader = DataLoader(images, batch_size=None, num_workers=2, collate_fn=lambda sample: sample)
    assert [(image.getpixel((0, 0))[0], label) for image, label in loader] == expected
    assert [images[n][1] for n in (4, 0, 3)] == [1, 0, 0]


def test_a_shard_that_changes_or_disappears(folder: Path) -> None:
    images = from_shards(str(folder)).train()
    shard = folder / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:1000])
    with pytest.raises(BadShard, match=r"train-000001.tar: cut in '.*:0003', it was longer at the start"):
        images[3]
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*train-000001.tar:0002: not an image"):
        images[2]
    (folder / "train-000002.tar").unlink()
    with pytest.raises(BadShard, match=r"train-000002.tar: No such file"):
        images[4]


def test_other_formats_are_not_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.gif")
    write(tmp_path / "own/train-%d.tar", [{"cls": 0, "png": (tmp_path / "a.gif").read_bytes()}])
    with pytest.raises(UnreadableImage):
        _ = Shards(str(tmp_path / "own")).images("train", dict, 1)[0]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{folder}/none", "dataset.shards: there is no folder .*/none"),
        ({"train": "{folder}/train-*.tar"}, "dataset.shards has no part 'val'"),
        ({"train": "x", "val": "{folder}/val-{{000000..000009}}.tar"}, "dataset.shards: there is no file .*val-000002"),
        ({"train": "x", "val": "{folder}/test*.tar"}, r"dataset.shards: there is no file .*test\*.tar"),
    ],
)
def test_missing_shards(shards: str | dict[str, str], message: str, folder: Path) -> None:
    if isinstance(shards, dict):
        shards = {part: pattern.format(folder=folder) for part, pattern in shards.items()}
    else:
        shards = shards.format(folder=folder)
    with pytest.raises(ValueError, match=message):
        from_shards(shards).val()


def test_missing_part_of_a_folder(folder: Path) -> None:
    for path in folder.glob("val-*"):
        path.rename(path.with_name(path.name.replace("val", "test")))
    with pytest.raises(ValueError, match=r"has no shards val-\*.tar \(it has: test, train\)"):
        from_shards(str(folder)).val()


def test_contradictory_keys(folder: Path) -> None:
    with pytest.raises(ValueError, match="shards is for storage=shards"):
        ImageFolder(folder, shards=str(folder))
    with pytest.raises(ValueError, match=r"storage=shards: set dataset.shards"):
        Cifar10(folder, storage="shards")
    with pytest.raises(ValueError, match="storage=shard: folder or shards; did you mean shards"):
        ImageNet(folder, storage="shard")  # type: ignore[arg-type]


def test_patterns_keep_their_order(folder: Path) -> None:
    names = [path.name for path in find_shards(f"{folder}/{{val,train}}-00000[01].tar")]
    assert names == ["val-000000.tar", "val-000001.tar", "train-000000.tar", "train-000001.tar"]
    assert np.array_equal(Shards({"val": f"{folder}/val-*.tar"}).index("val")[1].shard, [0, 0, 1])
