"""Waterbirds: parts, groups, boxes, and what is said about bad files."""

from pathlib import Path

import pytest
from PIL import Image

from bcos_train.dataset import Waterbirds

HEADER = "img_id,img_filename,y,split,place,place_filename"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lines = [HEADER]
    for i in range(12):
        name = f"001.Bird/{i:03}.jpg"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40 + i, 30), (i, i, i)).save(tmp_path / name)
        lines.append(f"{i + 1},{name},{i % 2},{i % 3},{i // 2 % 2},/f/forest.jpg")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    boxes = [f"{i + 1} {i}.0 2.0 10.0 20.0" for i in range(12)]
    (tmp_path / "bounding_boxes.txt").write_text("\n".join(boxes) + "\n")
    return tmp_path


def test_parts_labels_and_groups(root: Path) -> None:
    source = Waterbirds(root)
    source.prepare()
    for part, split in ((source.train(), 0), (source.val(), 1), (Waterbirds(root, val="test").val(), 2)):
        assert len(part) == 4
        for n, i in enumerate(range(split, 12, 3)):
            image, label, annotations = part[n]
            assert image.size == (40 + i, 30)
            assert label == i % 2
            assert annotations.group == 2 * (i % 2) + i // 2 % 2
            assert annotations.boxes is None
    assert source.group_names == ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
    assert not source.has_boxes


def test_boxes(root: Path) -> None:
    for source in (
        Waterbirds(root, boxes="bounding_boxes.txt"),
        Waterbirds(root, boxes=str(root / "bounding_boxes.txt")),
    ):
        assert source.has_boxes
        assert source.train()[1][2].boxes.tolist() == [[1, 3, 2, 13, 22]]
    assert Waterbirds(root).train().digest() != source.train().digest()


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metadata.csv", ",y,", ",label,", r"^\S*metadata.csv lacks the column y$"),
        ("metadata.csv", ",0,0,0,", ",2,0,0,", r"^\S*metadata.csv, line 2: y is '2', allowed are 0 or 1$"),
        ("metadata.csv", "003.jpg", "033.jpg", r"lacks images of the index: 001.Bird/033.jpg$"),
        ("bounding_boxes.txt", "4 3.0", "44 3.0", r"^\S*bounding_boxes.txt: no box for image 4, \S*003.jpg$"),
        (
            "bounding_boxes.txt",
            "4 3.0",
            "4 37.0",
            r"^\S*003.jpg: box 1 of 1 .* is not inside the image of 43×30 pixels$",
        ),
        (
            "bounding_boxes.txt",
            "4 3.0",
            "4 x",
            r"^boxes=\S*bounding_boxes.txt: could not convert string to float: 'x'$",
        ),
    ],
)
def test_mistakes(root: Path, file: str, old: str, new: str, message: str) -> None:
    _replace(root / file, old, new)
    boxes = "bounding_boxes.txt" if file == "bounding_boxes.txt" else None
    with pytest.raises(ValueError, match=message):
        Waterbirds(root, boxes=boxes).train()


def test_missing_files(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^boxes=\S*none.txt: No such file or directory$"):
        Waterbirds(root, boxes="none.txt").train()
    (root / "metadata.csv").unlink()
    with pytest.raises(ValueError, match=r"has no metadata.csv: set DATA_ROOT or dataset.root to Waterbirds' folder$"):
        Waterbirds(root).prepare()
