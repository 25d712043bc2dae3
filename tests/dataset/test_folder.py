"""Image folders and ImageNet: layouts, labels, odd and broken files, error messages."""

import logging
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from torchvision import datasets

from bcos_train.dataset import ImageFolder, ImageNet
from bcos_train.dataset.storage.folder import FolderImages

needs_data = pytest.mark.skipif(
    "BCOS_TEST_DATA" not in os.environ, reason="BCOS_TEST_DATA, the folder of the real images' zips, is not set"
)


def _write(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100 if mode in ("L", "P") else None).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "ant"):
            for i in range(count):
                _write(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_contents(root: Path) -> None:
    (root / "train" / ".cache").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    _write(root / "train" / "cat" / "deeper" / "x.JPEG")
    folder = ImageFolder(root)
    folder.prepare()
    assert folder.class_names == ["ant", "cat"]
    assert folder.num_classes == 2
    train, val = folder.train(), folder.val()
    assert (len(train), len(val)) == (7, 4)
    assert [train[i][1] for i in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert isinstance(train, FolderImages)
    assert train.path(6) == str(root / "train" / "cat" / "deeper" / "x.JPEG")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "a.png"),
        ("P", "a.png"),
        ("1", "a.png"),
        ("RGBA", "a.png"),
        ("LA", "a.png"),
        ("CMYK", "a.jpg"),
        ("L", "a.jpg"),
    ],
)
def test_every_mode_becomes_rgb(root: Path, mode: str, name: str) -> None:
    _write(root / "train" / "ant" / name, mode)
    train = ImageFolder(root).train()
    index = next(i for i in range(len(train)) if train.path(i).endswith(name))
    assert train[index][0].mode == "RGB"


@pytest.mark.parametrize("damage", ["truncated", "not an image", "empty"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_a_broken_image_is_named(root: Path, damage: str, suffix: str) -> None:
    path = _write(root / "val" / "ant" / f"broken.{suffix}", size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "not an image": b"<html>", "empty": b""}[damage])
    val = ImageFolder(root).val()
    with pytest.raises(ValueError, match=rf"cannot read the image .*val/ant/broken\.{suffix}: "):
        val[2]


def test_hidden_and_foreign_files(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """macOS's and Jupyter's leftovers are neither images nor classes, and what is left out is counted."""
    for part in ("train", "val"):
        _write(root / part / "__MACOSX" / "cat" / "._0.png")
        _write(root / part / ".ipynb_checkpoints" / "0.png")
    for path in ("cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/deep/@eaDir/0.png", "cat/Thumbs.db"):
        _write((root / "train" / path).with_name("x.png")).rename(root / "train" / path)
    _write(root / "train" / "flat.png")
    for i, suffix in enumerate((".jfif", ".gif", ".JFIF", ".avif")):
        (root / "train" / "ant" / f"{i}{suffix}").write_bytes(b"")
    folder = ImageFolder(root)
    assert folder.class_names == ["ant", "cat"]
    with caplog.at_level(logging.WARNING):
        assert len(folder.train()) == 6
    assert [record.getMessage() for record in caplog.records] == [
        f"{root / 'train'}: left out 1 images outside of class folders; 6 hidden or system files; files in other "
        "formats than jpg, jpeg, png, ppm, bmp, pgm, tif, tiff, webp: 2 .jfif, 1 .gif, 1 .avif"
    ]


def test_a_class_in_other_formats(root: Path) -> None:
    for path in (root / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"in the class folders cat; it has files in .*: 3 \.gif: set DATA_ROOT"):
        ImageFolder(root).train()


def test_same_order_as_torchvision(root: Path) -> None:
    for name in ("b/1.png", "b/a/1.png", "b-/1.png", "B/1.png", "b/10.png", "b/2.png"):
        _write(root / "train" / "cat" / name)
    train = ImageFolder(root).train()
    assert isinstance(train, FolderImages)
    expected = datasets.ImageFolder(str(root / "train")).samples
    assert [(train.path(i), int(train.labels[i])) for i in range(len(train))] == expected


def test_exif_orientation(root: Path) -> None:
    path = root / "val" / "ant" / "0.png"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6, 5)).save(path, exif=exif)
    assert ImageFolder(root).val()[0][0].size == (6, 5)
    assert ImageFolder(root, exif_orientation=True).val()[0][0].size == (5, 6)
    assert ImageNet(root, exif_orientation=True).val()[0][0].size == (5, 6)


def test_without_a_root() -> None:
    with pytest.raises(ValueError, match=r"no folder is set for the image folder: set DATA_ROOT or dataset\.root"):
        ImageFolder(None)
    with pytest.raises(ValueError, match=r"set IMAGENET_PATH or dataset\.root"):
        ImageNet(None)


def _nothing(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def _no_root(root: Path) -> None:
    _nothing(root)
    root.rmdir()


def _no_train(root: Path) -> None:
    _nothing(root / "train")
    (root / "train").rmdir()


def _flat(root: Path) -> None:
    _nothing(root / "train")
    _write(root / "train" / "1.png")


def _other_classes(root: Path) -> None:
    (root / "train" / "cat").rename(root / "train" / "dog")


def _class_without_images(root: Path) -> None:
    _nothing(root / "train" / "cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_root, r"there is no folder .*: set DATA_ROOT or dataset.root"),
        (_nothing, r"has no folder train/ \(it has: none\): set DATA_ROOT or .*, or dataset\.train"),
        (_no_train, r"has no folder train/ \(it has: val\): set DATA_ROOT or .*, or dataset\.train to"),
        (
            lambda root: _nothing(root / "train"),
            r"one folder per class, but it has no class folders: set DATA_ROOT",
        ),
        (_flat, r"its images are not in class folders: set DATA_ROOT"),
        (_other_classes, r"same class folders; only in train: dog, only in val: cat; set DATA_ROOT"),
        (
            _class_without_images,
            r"train has no images \(jpg, .*\) in the class folders cat: set DATA_ROOT",
        ),
    ],
    ids=["no root", "empty root", "no train", "empty train", "flat", "other classes", "class without images"],
)
def test_error_messages(root: Path, change, message: str) -> None:
    change(root)
    with pytest.raises(ValueError, match=message) as caught:
        ImageFolder(root).train()
    assert "\n" not in str(caught.value)


def test_training_on_the_validation_part(root: Path) -> None:
    _no_train(root)
    folder = ImageFolder(root, train="val")
    folder.prepare()
    assert len(folder.train()) == len(folder.val()) == 4


def test_imagenet_official_labels_of_a_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wnid in ("n01440764", "n01443537", "n15075141"):
        _write(tmp_path / "val" / wnid / "x.JPEG")
    imagenet = ImageNet(tmp_path)
    with caplog.at_level(logging.WARNING):
        imagenet.prepare()
        val = imagenet.val()
    assert [val[i][1] for i in range(3)] == [0, 1, 999]
    assert imagenet.num_classes == len(imagenet.class_names) == 1000
    assert imagenet.class_names[0] == "tench"
    assert imagenet.class_names[999] == "toilet tissue"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'val'} contains 3 images, the complete ImageNet 50,000"
    ]
    with pytest.raises(ValueError, match=r"no folder train/ \(it has: val\): set IMAGENET_PATH or dataset\.root"):
        imagenet.train()


def test_imagenet_unknown_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a"):
        _write(tmp_path / "val" / name / "x.png")
    imagenet = ImageNet(tmp_path, train="val")
    with caplog.at_level(logging.WARNING):
        imagenet.prepare()
        assert [imagenet.train()[i][1] for i in range(2)] == [0, 1]
    assert sum("class indices are not the official ones" in record.getMessage() for record in caplog.records) == 1
    assert imagenet.num_classes == len(imagenet.class_names) == 1000
    assert imagenet.class_names[:3] == ["a", "b", "class 2"]


def test_imagenet_a_thousand_wnids_need_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcos_train.dataset.imagenet._wnids", lambda: pytest.fail("not needed"))
    for i in range(1000):
        (tmp_path / "val" / f"n{i:08d}").mkdir(parents=True)
    imagenet = ImageNet(tmp_path)
    imagenet.prepare()
    assert imagenet.class_names[1] == "goldfish"
    (tmp_path / "val" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="1001 class folders"):
        ImageNet(tmp_path).prepare()


def test_imagenet_train_has_more_classes(tmp_path: Path) -> None:
    for part, wnids in (("val", ["n01440764"]), ("train", ["n01440764", "n01443537"])):
        for wnid in wnids:
            _write(tmp_path / part / wnid / "x.png")
    with pytest.raises(ValueError, match="class folders that val/ lacks, such as n01443537"):
        ImageNet(tmp_path).train()


def _unzip(name: str, target: Path, per_class: int) -> None:
    """The first images of every class."""
    taken: dict[str, int] = {}
    with zipfile.ZipFile(Path(os.environ["BCOS_TEST_DATA"]) / name) as archive:
        for member in sorted(archive.namelist()):
            folder = str(Path(member).parent)
            if not member.endswith("/") and taken.setdefault(folder, 0) < per_class:
                archive.extract(member, target)
                taken[folder] += 1


@needs_data
def test_cifar10_jpegs(tmp_path: Path) -> None:
    _unzip("cifar10-jpeg-train.zip", tmp_path, 3)
    _unzip("cifar10-jpeg-test.zip", tmp_path, 2)
    folder = ImageFolder(tmp_path, val="test")
    assert folder.class_names == [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ]  # fmt: skip
    train, val = folder.train(), folder.val()
    assert (len(train), len(val)) == (30, 20)
    assert {train[i][0].size for i in range(30)} == {(32, 32)}


@needs_data
def test_imagenet_sample(tmp_path: Path) -> None:
    _unzip("imagenet-sample-200.zip", tmp_path, 1)
    imagenet = ImageNet(tmp_path)
    val = imagenet.val()
    assert len(val) == 200
    # The file names end in the class's name: n01440764_tench.JPEG
    agree = 0
    for i in range(200):
        spoken = Path(val.path(i)).stem.split("_", 1)[1].replace("_", " ").lower()
        agree += spoken == imagenet.class_names[int(val.labels[i])].lower()
    assert agree > 150  # a few classes have several names
