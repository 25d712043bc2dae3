"""PASCAL VOC 2007: parts, boxes from its XML files, several labels, and what is said about bad files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import VOCDetection

from bcos_train.augmentation import plain
from bcos_train.dataset import Voc2007
from bcos_train.dataset.data_module import DataModule

Box = tuple[str, float, float, float, float]


def _write(root: Path, name: str, boxes: list[Box], size: tuple[int, int] = (50, 40), stated: bool = True) -> None:
    folder = root / "VOCdevkit" / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(folder / "JPEGImages" / f"{name}.jpg")
    objects = "".join(
        f"<object><name>{label}</name><difficult>{i % 2}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        "<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for i, (label, x0, y0, x1, y1) in enumerate(boxes)
    )
    width, height = size
    extent = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>" if stated else ""
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{extent}{objects}</annotation>")


def _parts(root: Path, **names: list[str]) -> None:
    for part, lines in names.items():
        (root / "VOCdevkit/VOC2007/ImageSets/Main" / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _write(tmp_path, "000005", [("person", 1, 1, 50, 40), ("dog", 11, 21, 20, 30), ("person", 3, 3, 3, 3)])
    _write(tmp_path, "000007", [("car", 5.4, 6.6, 10.0, 12.0)])
    _write(tmp_path, "000009", [("tvmonitor", 2, 2, 9, 9)], stated=False)
    _parts(
        tmp_path, train=["000005", "000007"], val=["000009"], trainval=["000005", "000007", "000009"], test=["000007"]
    )
    return tmp_path


def test_boxes_and_labels(root: Path) -> None:
    source = Voc2007(root)
    source.prepare()
    image, label, annotations = source.train()[0]
    assert (image.size, image.mode) == ((50, 40), "RGB")
    # Pixels count from 1 and both corners are inside, in the files.
    assert annotations.boxes.tolist() == [[14, 0, 0, 50, 40], [11, 10, 20, 20, 30], [14, 2, 2, 3, 3]]
    assert [source.class_names[k] for k in np.flatnonzero(label)] == ["dog", "person"]
    assert (label.dtype, label.shape) == (np.float32, (20,))
    assert source.train()[1][2].boxes.tolist() == [[6, 4, 6, 10, 12]]
    assert source.val()[0][2].boxes.tolist() == [[19, 1, 1, 9, 9]]
    assert source.class_names == sorted(source.class_names)


def test_reads_what_torchvision_reads(root: Path) -> None:
    theirs, ours = VOCDetection(str(root), year="2007", image_set="trainval"), Voc2007(root, train="trainval").train()
    assert len(ours) == len(theirs) == 3
    names = Voc2007(root).class_names
    for (image, label, annotations), (their_image, content) in zip((ours[i] for i in range(3)), theirs, strict=True):
        assert image.tobytes() == their_image.tobytes()
        objects = content["annotation"]["object"]
        assert [names[row[0]] for row in annotations.boxes] == [entry["name"] for entry in objects]
        assert set(np.flatnonzero(label)) == {names.index(entry["name"]) for entry in objects}


def test_parts(root: Path) -> None:
    lengths = {part: len(Voc2007(root, val=part).val()) for part in ("train", "val", "trainval", "test")}
    assert lengths == {"train": 2, "val": 1, "trainval": 3, "test": 1}
    digests = {Voc2007(root, val=part).val().digest() for part in lengths}
    assert len(digests) == 4


def test_batches(root: Path) -> None:
    module = DataModule(Voc2007(root), plain(100), plain(100), batch_size=2)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert batch.labels.shape == (2, 20)
    by_index = dict(zip(batch.indices.tolist(), batch.extras["boxes"], strict=True))
    # 50×40 becomes 100×100.
    assert by_index[1].tolist() == [[6, 8, 15, 20, 30], [-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]]
    assert torch.equal(by_index[0][1], torch.tensor([11, 20, 50, 40, 75]))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([("dog", 1, 1, 51, 40)], "box 1 of 1 (x0, y0, x1, y1 = 0, 0, 51, 40) is not inside the image of 50×40 pixels"),
        ([("dog", 9, 9, 8, 12)], "box 1 of 1 (x0, y0, x1, y1 = 8, 8, 8, 12) is empty"),
        ([], "no object, so there are neither boxes nor labels"),
        ([("dogg", 1, 1, 5, 5)], "unknown class 'dogg'; did you mean dog?"),
        ([("dog", "x", 1, 5, 5)], "could not convert string to float: 'x'"),
    ],
)
def test_bad_annotations(root: Path, boxes: list[Box], message: str) -> None:
    _write(root, "000005", boxes)
    path = root / "VOCdevkit/VOC2007/Annotations/000005.xml"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        Voc2007(root).train()


def test_damaged_and_missing_files(root: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2007"
    (folder / "Annotations" / "000005.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"^[^\n]*000005.xml: no element found[^\n]*$"):
        Voc2007(root).train()
    (folder / "Annotations" / "000005.xml").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*000005.xml: No such file or directory$"):
        Voc2007(root).train()
    (folder / "JPEGImages" / "000007.jpg").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages lacks images of the index: 000007.jpg$"):
        Voc2007(root, val="test").val()


def test_download(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Downloads:
        def __init__(self, root: str, year: str, image_set: str, download: bool) -> None:
            calls.append((root, year, image_set, download))
            raise OSError("no network")

    monkeypatch.setattr("bcos_train.dataset.voc.VOCDetection", Downloads)
    Voc2007(root).prepare()
    assert calls == []
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"^VOC 2007 could not be downloaded to .*elsewhere \(no network\): unpack"):
        Voc2007(elsewhere).prepare()
    assert calls == [(str(elsewhere), "2007", "train", True)]
    with pytest.raises(
        ValueError, match=r"^no VOC 2007 in .*elsewhere \(expected VOCdevkit/VOC2007/ImageSets/Main/train"
    ):
        Voc2007(elsewhere, download=False).prepare()
