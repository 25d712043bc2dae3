"""Composed images: exact boxes, a background that predicts the class or misleads, and counter-based randomness."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cifar10_files import write_cifar10
from PIL import Image
from skimage import data

from bcos_train.dataset import Pasted
from bcos_train.dataset.pasted import BACKGROUNDS
from bcos_train.dataset.randomness import random_words


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red for class 0, with more green for each further class."""
    return write_cifar10(tmp_path_factory.mktemp("cifar10"), 30, lambda label, i: (255, 10 * label, 0))


def _is_object(image: Image.Image) -> np.ndarray:
    """Pixels that are not gray, (H, W)."""
    pixels = np.asarray(image).astype(int)
    return pixels[..., 0] != pixels[..., 2]


@pytest.mark.parametrize("size", [96, 224])
@pytest.mark.parametrize("max_objects", [1, 4])
def test_boxes_are_exact(root: Path, size: int, max_objects: int) -> None:
    source = Pasted(root, size=size, max_objects=max_objects)
    counts, sides, lefts = set(), set(), set()
    for images in (source.train(), source.val()):
        for index in range(0, 300, 5):
            image, label, annotations = images[index]
            assert (image.size, image.mode) == ((size, size), "RGB")
            expected = np.full((size, size), -1)
            for name, x0, y0, x1, y1 in annotations.boxes.tolist():
                assert (expected[y0:y1, x0:x1] == -1).all(), "objects overlap"
                expected[y0:y1, x0:x1] = name
                assert 0.25 * size <= x1 - x0 == y1 - y0 <= 0.5 * size
                sides.add(x1 - x0)
                lefts.add(x0)
            assert ((expected >= 0) == _is_object(image)).all()
            assert (expected[expected >= 0] == np.asarray(image)[..., 1][expected >= 0] // 10).all()
            counts.add(len(annotations.boxes))
            classes = sorted({int(row[0]) for row in annotations.boxes})
            assert annotations.boxes[0, 0] == index // 30
            if max_objects == 1:
                assert (type(label), [label]) == (int, classes)
            else:
                assert label.dtype == np.float32
                assert np.flatnonzero(label).tolist() == classes
                assert set(label.tolist()) == {0, 1}
    assert counts == ({1} if max_objects == 1 else {1, 2, 3, 4})
    assert len(sides) > 10
    assert len(lefts) > 20


def test_backgrounds_are_windows_of_the_photographs(root: Path) -> None:
    images = Pasted(root, size=32, max_scale=0.3).train()
    seen = set()
    for index in range(12):
        image, _, annotations = images[index]
        keep = ~_is_object(image)
        for name in BACKGROUNDS:
            windows = np.lib.stride_tricks.sliding_window_view(getattr(data, name)(), (32, 32))
            # A few pixels narrow the candidates down before all are compared.
            rows, columns = keep.nonzero()
            gray = np.asarray(image)[..., 0]
            candidates = np.ones(windows.shape[:2], dtype=bool)
            for row, column in zip(rows[:6], columns[:6], strict=True):
                candidates &= windows[:, :, row, column] == gray[row, column]
            if any((windows[top, left] == gray)[keep].all() for top, left in zip(*candidates.nonzero(), strict=True)):
                seen.add(name)
                break
        else:
            pytest.fail("no photograph contains this background")
        assert annotations.group is None
    assert seen == set(BACKGROUNDS)


def test_composition_depends_on_seed_part_and_index_alone(root: Path) -> None:
    def pixels(seed: int, part: str, index: int) -> bytes:
        return getattr(Pasted(root, max_objects=3, seed=seed), part)()[index][0].tobytes()

    images = Pasted(root, max_objects=3, seed=1).train()
    for index in (7, 3, 7):  # in any order
        assert images[index][0].tobytes() == pixels(1, "train", index)
    assert len({pixels(1, "train", 3), pixels(1, "train", 4), pixels(2, "train", 3), pixels(1, "val", 3)}) == 4


@pytest.mark.parametrize(("correlation", "val_correlation"), [(0.9, None), (0.5, 0.5), (1.0, None)])
def test_background_predicts_the_class_and_misleads_in_validation(
    root: Path, correlation: float, val_correlation: float | None
) -> None:
    source = Pasted(root, size=32, background_correlation=correlation, val_background_correlation=val_correlation)
    names = source.group_names
    assert len(names) == 30
    assert names[3 * 4 + 1] == "deer on gravel"
    for images, share in ((source.train(), correlation), (source.val(), val_correlation or 1 - correlation)):
        own, other = 0, [0, 0]
        for index in range(300):
            _, label, annotations = images[index]
            group_class, background = divmod(annotations.group, 3)
            assert group_class == label
            own += background == label % 3
            if background != label % 3:
                other[(background - label) % 3 - 1] += 1
        assert abs(own / 300 - share) < 0.06
        if sum(other) > 50:
            assert abs(other[0] / sum(other) - 0.5) < 0.2


def test_group_names_the_background_that_is_seen(root: Path) -> None:
    images = Pasted(root, size=512, max_scale=0.25, background_correlation=0.3).train()
    for index in range(0, 300, 30):
        image, _, annotations = images[index]
        keep = ~_is_object(image)
        photograph = getattr(data, BACKGROUNDS[annotations.group % 3])()
        assert (np.asarray(image)[..., 0] == photograph)[keep].all()


def test_digest_changes_with_the_settings(root: Path) -> None:
    settings = [{}, {"size": 97}, {"seed": 1}, {"max_objects": 2}, {"background_correlation": 0.5}, {"max_scale": 0.6}]
    digests = [
        part().digest() for s in settings for source in [Pasted(root, **s)] for part in (source.train, source.val)
    ]
    assert len(set(digests)) == 12
    assert Pasted(root).train().digest() == digests[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 600}, "size must lie between 32 and 512 pixels, not 600"),
        ({"min_scale": 0.6}, r"0 < min_scale <= max_scale <= 1 must hold; got 0.6 and 0.5"),
        ({"max_objects": 0}, "max_objects must lie between 1 and 16, not 0"),
        ({"background_correlation": 1.5}, "background_correlation must lie between 0 and 1, not 1.5"),
        ({"val_background_correlation": 0.5}, "val_background_correlation needs background_correlation"),
        (
            {"background_correlation": 0.5, "max_objects": 3},
            "background_correlation needs images of one class: max_objects=1, not 3",
        ),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_mistakes(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Pasted("data", **settings)


def test_random_words() -> None:
    words = random_words(1000, 3, 6, 1)
    assert words.dtype == np.uint64
    assert (random_words(10, 3, 6, 1) == words[:10]).all()
    assert len({*words.tolist(), *random_words(1000, 3, 6, 2).tolist()}) == 2000
    assert abs((words % np.uint64(7) == 0).mean() - 1 / 7) < 0.04


@pytest.mark.skipif(
    "BCOS_TEST_DATA" not in os.environ, reason="BCOS_TEST_DATA, the folder of the real images' zips, is not set"
)
def test_with_real_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(os.environ["BCOS_TEST_DATA"]) / "cifar10-jpeg-test.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(("0001.jpg", "0002.jpg"))]
        archive.extractall(tmp_path, names)
    (tmp_path / "test").rename(tmp_path / "train")
    (tmp_path / "test").symlink_to("train")
    source = Pasted(tmp_path, size=128, background_correlation=1.0)
    image, label, annotations = source.train()[4]
    (name, x0, y0, x1, y1), path = annotations.boxes[0].tolist(), sorted((tmp_path / "train").glob("*/*"))[4]
    expected = Image.open(path).convert("RGB").resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    assert image.crop((x0, y0, x1, y1)).tobytes() == expected.tobytes()
    assert (label, annotations.group) == (name, 3 * name + name % 3)
