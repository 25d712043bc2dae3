"""The inventory of a data set: equal for equal files, different for any other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bcos_train.augmentation import plain
from bcos_train.dataset import Digits, ImageFolder
from bcos_train.dataset.classes import with_model_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.inventory import OtherImages, check_same_images


def write_images(root: Path) -> Path:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8)).save(root / part / name / f"{i}.png")
    return root


def inventory(source: object, **options: int) -> dict[str, dict[str, object]]:
    transforms = {"train_transform": plain(), "eval_transform": plain()}
    return DataModule(source, batch_size=2, **transforms, **options).inventory  # type: ignore[arg-type]


def add(root: Path) -> None:
    shutil.copy(root / "train/a/0.png", root / "train/a/new.png")


def rename(root: Path) -> None:
    (root / "val/b/0.png").rename(root / "val/b/00.png")


def move(root: Path) -> None:
    (root / "train/a/0.png").rename(root / "train/b/9.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add, "the last checkpoint: 7 instead of 6 training images; restore them, use resume=data_changed"),
        (rename, "the last checkpoint: other names or classes among the 6 validation images; restore"),
        (move, "the last checkpoint: other names or classes among the 6 training images; restore"),
    ],
)
def test_any_change_is_named(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    before = inventory(ImageFolder(root))
    check_same_images(inventory(ImageFolder(shutil.copytree(root, tmp_path / "moved"))), before)
    change(root)
    with pytest.raises(OtherImages, match=message) as caught:
        check_same_images(inventory(ImageFolder(root)), before)
    assert "\n" not in str(caught.value)


def test_subsets_and_mapped_classes_have_the_whole_inventory(tmp_path: Path) -> None:
    source = ImageFolder(write_images(tmp_path), class_map={"a": "x", "b": "y"})
    whole = inventory(source)
    assert inventory(source, limit_train=2, limit_val=1) == whole
    assert inventory(with_model_classes(source, ("x", "y"), "a model")) == whole
    assert whole["train"]["count"] == 6


def test_without_files_the_numbers_count() -> None:
    assert inventory(Digits(8)) == {"train": {"count": 1438, "digest": None}, "val": {"count": 359, "digest": None}}
