"""Images that can't be read are replaced or left out, named once and counted, up to a limit."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bcos_train.augmentation import plain
from bcos_train.dataset import ImageFolder, UnreadableImage
from bcos_train.dataset.base import check_max_skipped
from bcos_train.dataset.classes import with_model_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.unreadable import TooManyUnreadable, accepted

N = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve gray images of two classes in each part; the shade of image n is 10 n."""
    for part in ("train", "val"):
        for n in range(N):
            folder = tmp_path / part / "ab"[n // 6]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (10 * n,) * 3).save(folder / f"{n:02d}.png")
    return tmp_path


def break_image(root: Path, part: str, n: int, content: bytes | None = b"text") -> None:
    path = root / part / "ab"[n // 6] / f"{n:02d}.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def make(root: Path, max_skipped: float = 0.3, **options: int) -> DataModule:
    source = ImageFolder(root, max_skipped=max_skipped)
    return DataModule(source, plain(), plain(), **{"batch_size": 4, **options})  # type: ignore[arg-type]


def epoch(data: DataModule, part: str = "train", number: int = 0) -> list[tuple[int, int, int]]:
    """Index, label and shade of each sample."""
    loader = data.train_dataloader() if part == "train" else data.val_dataloader()
    if part == "train":
        loader.batch_sampler.set_epoch(number)  # type: ignore[union-attr]
    return [
        (int(index), int(label), int(image[0, 0, 0]))
        for batch in loader
        for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True)
    ]


def test_a_replaced_sample_is_another_one_with_its_own_label(root: Path) -> None:
    whole = epoch(make(root))
    break_image(root, "train", 3)
    data = make(root)
    samples = epoch(data)
    assert len(samples) == N
    assert all(shade == 10 * index and label == index // 6 for index, label, shade in samples)
    (position,) = [i for i, sample in enumerate(whole) if sample[0] == 3]
    assert [sample for i, sample in enumerate(samples) if i != position] == [s for s in whole if s[0] != 3]
    assert samples[position][0] != 3
    assert data.count_skipped("train") == 1


def test_replacements_depend_on_the_epoch_only(root: Path) -> None:
    break_image(root, "train", 3)
    break_image(root, "train", 8)
    first = [epoch(make(root), number=number) for number in range(4)]
    again = [epoch(make(root, num_workers=2), number=number) for number in range(4)]
    assert first == again
    random.seed(1)
    assert epoch(make(root), number=2) == first[2]
    resumed = make(root)
    resumed.seek(2, 1)
    assert epoch(resumed, number=2) == first[2][4:]


def test_validation_leaves_them_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A whole batch of them, too.
    for n in (0, 1, 2, 3, 9):
        break_image(root, "val", n)
    data = make(root, max_skipped=0.5)
    assert [index for index, *_ in epoch(data, "val")] == [4, 5, 6, 7, 8, 10, 11]
    assert data.count_skipped("eval") == 5
    assert caplog.text.count("validation images of imagefolder: left out, cannot read the image") == 5
    assert [index for index, *_ in epoch(data, "val")] == [4, 5, 6, 7, 8, 10, 11]
    assert data.count_skipped("eval") == 5
    assert caplog.text.count("left out") == 5  # each of them once


def test_chosen_samples_stay_complete(root: Path) -> None:
    for n in (0, 5):
        break_image(root, "val", n)
        break_image(root, "train", n)
    for workers in (0, 2):
        data = make(root, num_workers=workers)
        list(data.val_dataloader())
        assert len(data.val_samples(range(N))[0]) == N
        assert len(data.train_samples(range(N))[0]) == N
        assert data.count_skipped("eval") == 2


BAD = {
    "text": b"not an image",
    "empty": b"",
    "missing": None,
    "cut": "cut",
    "html": b"<!doctype html><p>404",
}


@pytest.mark.parametrize("kind", BAD)
def test_kinds_of_unreadable_files(kind: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make(root)
    data.setup()
    content = BAD[kind]
    if content == "cut":
        content = (root / "train/a/02.png").read_bytes()[:44]
    break_image(root, "train", 2, content)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert len(epoch(data)) == N
    assert caplog.text.count(f"{root}/train/a/02.png") == 1


def test_images_in_other_modes_are_read(root: Path) -> None:
    """Gray, palette with transparency, 16 bits, CMYK and an orientation are no reason to leave an image out."""
    folder = root / "train/a"
    Image.new("L", (8, 6), 7).save(folder / "00.png")
    Image.new("P", (8, 6)).save(folder / "01.png", transparency=0)
    Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16)).save(folder / "02.png")
    Image.new("CMYK", (8, 6)).save(folder / "03.jpg")
    (folder / "03.png").unlink()
    (folder / "._04.png").write_bytes(b"macOS")
    (folder / "Thumbs.db").write_bytes(b"Windows")
    data = make(root, max_skipped=0)
    assert len(epoch(data)) == N


def test_the_limit(root: Path) -> None:
    for n in (1, 4, 7, 9):
        break_image(root, "train", n)
    with pytest.raises(TooManyUnreadable, match=r"^more than 3 of the training images of imagefolder can't be read"):
        epoch(make(root, max_skipped=0.3))
    assert len(epoch(make(root, max_skipped=0.34))) == N
    with pytest.raises(UnreadableImage):
        epoch(make(root, max_skipped=0))
    assert [accepted(12, 0.3), accepted(12, 0.001), accepted(12, 0), accepted(1_281_167, 0.001)] == [3, 1, 0, 1281]


def test_a_folder_that_disappears(root: Path) -> None:
    data = make(root, max_skipped=0.3)
    data.setup()
    (root / "train").rename(root / "gone")
    with pytest.raises(TooManyUnreadable, match=r"train/./\d\d.png: no such file"):
        epoch(data)


def test_other_causes_stop_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bcos_train.dataset import image as module

    def fail(_: object, formats: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.Image, "open", fail)
    with pytest.raises(UnreadableImage, match="Input/output error"):
        epoch(make(root))


def test_with_a_class_map(root: Path) -> None:
    break_image(root, "train", 2)
    source = with_model_classes(ImageFolder(root, class_map={"a": "x"}, max_skipped=0.3), ["x", "b"], "a model")
    assert len(epoch(DataModule(source, plain(), plain(), batch_size=4))) == N


@pytest.mark.parametrize("value", [-0.1, 1, 5])
def test_a_share_is_below_one(value: float) -> None:
    with pytest.raises(ValueError, match=f"max_skipped={value}: a share"):
        check_max_skipped(value)
