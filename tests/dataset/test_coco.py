"""COCO: parts, boxes and labels from its JSON files, and what is said about bad ones."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bcos_train.dataset import Coco

CATEGORIES = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def _write(root: Path, part: str, boxes: dict[int, list[tuple[int, list[float]]]]) -> None:
    """``boxes``: image -> (category, [x, y, width, height]) for each object."""
    (root / part).mkdir(exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for image, objects in boxes.items():
        name = f"COCO_{part}_{image:012}.jpg"
        Image.new("RGB", (60, 40), (image % 256, 0, 0)).save(root / part / name)
        images.append({"id": image, "file_name": name, "width": 60, "height": 40})
        for category, box in objects:
            entry = {"id": len(annotations), "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
            annotations.append(entry)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    boxes: dict[int, list[tuple[int, list[float]]]] = {i: [(1, [i, 2, 10, 10])] for i in range(20)}
    boxes[3] = [(44, [1.5, 2.2, 3.0, 4.0]), (18, [0, 0, 60, 40]), (18, [50.0, 30.0, 10.4, 10.0])]
    boxes[5] = []
    _write(tmp_path, "train2014", boxes)
    _write(tmp_path, "val2014", {7: [(18, [0, 0, 5, 5])], 8: [(1, [1, 1, 2, 2]), (1, [4, 4, 0, 3])]})
    return tmp_path


def test_boxes_and_labels(root: Path) -> None:
    source = Coco(root)
    source.prepare()
    assert source.class_names == ["person", "dog", "bottle"]
    train, val = source.train(), source.val()
    samples = [part[i] for part in (train, val) for i in range(len(part))]
    (label, annotations), *others = [(label, a) for _, label, a in samples if len(a.boxes) == 3]
    assert others == []
    # Whole pixels: 1.5 … 4.5 and 2.2 … 6.2.
    assert annotations.boxes.tolist() == [[2, 1, 2, 5, 7], [1, 0, 0, 60, 40], [1, 50, 30, 60, 40]]
    assert (label.tolist(), label.dtype) == ([0, 1, 1], np.float32)


def test_parts(root: Path) -> None:
    train, val = Coco(root).train(), Coco(root).val()
    assert (len(train), len(val)) == (17, 2)  # image 5 has no object
    seen = {tuple(part[i][2].boxes[0]) for part in (train, val) for i in range(len(part))}
    assert len(seen) == 19
    assert (len(Coco(root, val_fraction=0.5).train()), len(Coco(root, val_fraction=0.5).val())) == (9, 10)
    assert Coco(root).train().digest() == train.digest() != val.digest()


def test_empty_boxes_are_left_out_in_one_line(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        test = Coco(root, val="test").val()
    assert [test[i][2].boxes.tolist() for i in range(2)] == [[[1, 0, 0, 5, 5]], [[0, 1, 1, 3, 3]]]
    assert [record.getMessage() for record in caplog.records] == [
        f"{root}/annotations/instances_val2014.json: left out 1 empty boxes"
    ]


def test_nothing_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Coco(root).train()
    assert capsys.readouterr() == ("", "")


def test_mistakes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(root, "val2014", {7: [(18, [58, 0, 5, 5])]})
    with pytest.raises(ValueError, match=r"val2014.json, COCO_val2014_000000000007.jpg: box 1 of 1 .* is not inside"):
        Coco(root, val="test").val()
    (root / "annotations" / "instances_val2014.json").write_text("{")
    with pytest.raises(ValueError, match=r"^cannot read \S*instances_val2014.json: Expecting property name[^\n]*$"):
        Coco(root, val="test").prepare()
    with pytest.raises(ValueError, match=r"^there is no \S*instances_train2014.json: set DATA_ROOT or dataset.root"):
        Coco(root / "elsewhere").prepare()
    with pytest.raises(ValueError, match=r"^val_fraction must lie between 0 and 1, not 1$"):
        Coco(root, val_fraction=1)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=r"pip install pycocotools$"):
        Coco(root).prepare()
