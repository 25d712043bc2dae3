"""A few images per class, and a validation part from the training images."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from bcos_train.augmentation import plain
from bcos_train.dataset import Cifar10, Digits, ImageFolder, ImageNet
from bcos_train.dataset.base import ImageDataset, ImageSource
from bcos_train.dataset.classes import with_model_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.split import Split


def labels(images: ImageDataset) -> list[int]:
    return [int(images[i][1]) for i in range(len(images))]  # type: ignore[arg-type]


def pixels(images: ImageDataset) -> list[bytes]:
    return [images[i][0].tobytes() for i in range(len(images))]  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images that differ in color: in train 6 of class a and 9 of class b, in val 2 of each."""
    shades = iter(range(256))
    for part, counts in {"train": {"a": 6, "b": 9}, "val": {"a": 2, "b": 2}}.items():
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (next(shades), 0, 0)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_shots_are_balanced_and_repeatable(root: Path) -> None:
    one, again = (ImageFolder(root, shots=4).train() for _ in range(2))
    assert labels(one) == [0] * 4 + [1] * 4
    assert pixels(one) == pixels(again)
    assert pixels(one) != pixels(ImageFolder(root, shots=4, split_seed=43).train())
    assert set(pixels(ImageFolder(root, shots=2).train())) < set(pixels(one))
    assert labels(ImageFolder(root, shots=4).val()) == [0, 0, 1, 1]  # the data set's own


def test_validation_images_are_not_among_the_training_images(root: Path) -> None:
    everything = set(pixels(ImageFolder(root).train()))
    source = ImageFolder(root, val_per_class=2)
    train, val = source.train(), source.val()
    assert labels(val) == [0, 0, 1, 1]
    assert labels(train) == [0] * 4 + [1] * 7
    assert set(pixels(train)) | set(pixels(val)) == everything
    assert not set(pixels(train)) & set(pixels(val))
    few = ImageFolder(root, val_per_class=2, shots=3)
    assert pixels(few.val()) == pixels(val)
    assert set(pixels(few.train())) < set(pixels(train))
    assert labels(few.train()) == [0] * 3 + [1] * 3


def test_the_draw_stays_the_same_in_later_versions() -> None:
    drawn = Split(2, 1, seed=42)._shuffled_classes(Digits().train(), list("0123456789"))
    assert [part[:3].tolist() for part in drawn[:2]] == [[873, 466, 773], [104, 79, 223]]


@pytest.mark.parametrize("data_set", [Cifar10, ImageNet])
def test_other_data_sets_with_folders(data_set: type, root: Path, tmp_path: Path) -> None:
    names = Cifar10(root).class_names if data_set is Cifar10 else ["n01440764", "n01443537"]
    for part in ("train", "val", "test"):
        for name in names:
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (4, 4)).save(tmp_path / "images" / part / name / f"{i}.png")
    source: ImageSource = data_set(tmp_path / "images", shots=2, val_per_class=1)
    assert Counter(labels(source.train())) == dict.fromkeys(range(len(names)), 2)
    assert Counter(labels(source.val())) == dict.fromkeys(range(len(names)), 1)


def test_labels_of_torchvisions_cifar10() -> None:
    targets = [0, 1, 1, 0, 1, 1]
    part = Split(shots=2).train(SimpleNamespace(targets=targets), ["a", "b"])  # type: ignore[arg-type]
    assert [targets[i] for i in part.indices].count(1) == 2  # type: ignore[attr-defined]
    assert {0, 3} < set(part.indices)  # type: ignore[attr-defined]


def test_digits_and_a_class_map() -> None:
    digits = Digits(shots=3, val_per_class=2, class_map={"1": "0"})
    mapped = with_model_classes(digits, [str(i) for i in range(10)], "a model")
    assert Counter(labels(mapped.train())) == {0: 6, **dict.fromkeys(range(2, 10), 3)}
    assert Counter(labels(mapped.val())) == {0: 4, **dict.fromkeys(range(2, 10), 2)}


def test_changed_files_are_noticed(root: Path) -> None:
    def inventory() -> object:
        data = DataModule(ImageFolder(root, shots=2), plain(), plain(), batch_size=2, limit_train=3)
        return data.inventory["train"]

    before = inventory()
    (root / "train/a/5.png").rename(root / "train/a/6.png")
    assert inventory() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots=0: at least 1"),
        ({"val_per_class": -1}, "val_per_class=-1: at least 1"),
        ({"shots": 1, "split_seed": -1}, "split_seed=-1: at least 0"),
        ({"shots": 7}, "shots=7: class 'a' has 6 training images"),
        ({"val_per_class": 6}, "val_per_class=6: class 'a' has 6 training images"),
        ({"shots": 5, "val_per_class": 2}, "shots=5 and val_per_class=2: class 'a' has 6 training images"),
    ],
)
def test_impossible_numbers(options: dict[str, int], message: str, root: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(root, **options).train()  # type: ignore[arg-type]
