"""Boxes move with their image, through transforms, collation and loaders, and change nothing without boxes."""

import re

import numpy as np
import pytest
import torch
from dataset.annotated import SIZE, AnnotatedImages, AnnotatedSource
from PIL import Image
from torchvision.transforms import v2

from bcos_train.augmentation import crop_flip, digits_train, imagenet_eval, imagenet_train, plain
from bcos_train.dataset import Digits, SeededDataset
from bcos_train.dataset.boxes import check_boxes, check_carries_boxes, pad_boxes, transform_with_boxes
from bcos_train.dataset.classes import with_model_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.randomness import seed_generators
from bcos_train.dataset.seeded import collate, join_batches

EXACT = [plain(), crop_flip(16, 4), crop_flip(24, 6), v2.Compose([v2.CenterCrop(13), v2.PILToTensor()])]
SCALED = [plain(48), imagenet_eval(32, 28), imagenet_train(20)]


def _enclosing(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def _one_box(index: int) -> tuple[Image.Image, np.ndarray]:
    image, _, annotations = AnnotatedImages()[3 * index + 1]
    return image, annotations.boxes


@pytest.mark.parametrize("transform", [*EXACT, *SCALED, digits_train()], ids=str)
def test_box_is_where_the_pixels_are(transform: v2.Compose) -> None:
    tolerance = 0 if transform in EXACT else 2  # scaled images are blurred
    n_seen = 0
    for index in range(40):
        image, boxes = _one_box(index)
        seed_generators(index)
        moved, after = transform_with_boxes(transform, image, boxes)
        white = moved[0] > 127
        if white.sum() > 12 or (tolerance == 0 and white.any()):
            n_seen += 1
            assert after[0, 0] == boxes[0, 0]
            # A rotated rectangle is inside of its box, apart from that both have the same edges.
            difference = (after[0, 1:] - torch.tensor(_enclosing(white))).abs().max()
            assert difference <= (4 if "Affine" in str(transform) else tolerance), index
        elif not white.any() and tolerance == 0:
            assert after.shape == (0, 5)
    assert n_seen > 20


@pytest.mark.parametrize("transform", [*EXACT, *SCALED, digits_train()], ids=str)
def test_image_is_bit_identical_to_that_without_boxes(transform: v2.Compose) -> None:
    for index in range(10):
        image, boxes = _one_box(index)
        for rows in (boxes, boxes[:0]):
            seed_generators(index)
            moved, after = transform_with_boxes(transform, image, rows)
            following = torch.rand(())
            seed_generators(index)
            assert torch.equal(moved, transform(image))
            assert torch.rand(()) == following
            assert type(after) is torch.Tensor
            assert after.dtype == torch.int64


def test_flip_is_half_open() -> None:
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.PILToTensor()])
    _, after = transform_with_boxes(flip, Image.new("RGB", (10, 8)), np.array([[2, 0, 1, 3, 8]]))
    assert after.tolist() == [[2, 7, 1, 10, 8]]


def test_resize_rounds_and_crop_clips() -> None:
    resize = v2.Compose([v2.Resize((4, 10)), v2.PILToTensor()])
    boxes = np.array([[0, 1, 1, 4, 7], [1, 0, 0, 16, 8], [2, 0, 0, 1, 8]])
    _, after = transform_with_boxes(resize, Image.new("RGB", (16, 8)), boxes)
    # 10/16 · (1, 4) = (0.6, 2.5), 4/8 · (1, 7) = (0.5, 3.5)
    assert after.tolist() == [[0, 1, 1, 3, 4], [1, 0, 0, 10, 4], [2, 0, 0, 1, 4]]
    crop = v2.Compose([v2.CenterCrop((8, 4)), v2.PILToTensor()])
    _, after = transform_with_boxes(crop, Image.new("RGB", (16, 8)), boxes)
    assert after.tolist() == [[1, 0, 0, 4, 8]]


def test_pad_boxes() -> None:
    one, two = torch.tensor([[4, 0, 1, 2, 3]]), torch.tensor([[1, 1, 1, 2, 2], [0, 5, 5, 6, 6]])
    none = torch.zeros(0, 5, dtype=torch.int64)
    padding = [-1, 0, 0, 0, 0]
    assert pad_boxes([one, none, two]).tolist() == [[*one.tolist(), padding], [padding] * 2, two.tolist()]
    assert pad_boxes([none]).tolist() == [[padding]]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 5, 9], "x.xml: box 2 of 2 (x0, y0, x1, y1 = 0, 0, 5, 9) is not inside the image of 10×8 pixels"),
        ([-1, 0, 5, 8], "x.xml: box 2 of 2 (x0, y0, x1, y1 = -1, 0, 5, 8) is not inside the image of 10×8 pixels"),
        ([4, 4, 4, 8], "x.xml: box 2 of 2 (x0, y0, x1, y1 = 4, 4, 4, 8) is empty"),
        ([4, 5, 6, 4], "x.xml: box 2 of 2 (x0, y0, x1, y1 = 4, 5, 6, 4) is empty"),
    ],
)
def test_bad_boxes(box: list[int], message: str) -> None:
    good = [0, 0, 0, 10, 8]
    check_boxes(np.array([good]), 10, 8, "x.xml")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_boxes(np.array([good, [0, *box]]), 10, 8, "x.xml")


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (imagenet_train(20, policy="ra"), "RandAugment"),
        (imagenet_train(20, random_erase_prob=0.5), "RandomErasing"),
        (v2.functional.pil_to_tensor, "pil_to_tensor"),
    ],
)
def test_transforms_that_lose_boxes_are_refused(transform: object, name: str) -> None:
    for passes in (*EXACT, *SCALED, digits_train()):
        check_carries_boxes(passes, "augmentation.train")
    with pytest.raises(ValueError, match=f"^augmentation.train: {name} doesn't move the boxes"):
        check_carries_boxes(transform, "augmentation.train")


def _module(**changes: object) -> DataModule:
    arguments = {"dataset": AnnotatedSource(), "train_transform": crop_flip(16, 2), "eval_transform": plain()}
    return DataModule(**{**arguments, "batch_size": 4, "seed": 5, **changes})


@pytest.mark.parametrize("is_multi_label", [True, False])
def test_loaders(is_multi_label: bool) -> None:
    module = _module(dataset=AnnotatedSource(is_multi_label))
    module.setup("fit")
    assert (module.has_boxes, module.is_multi_label, module.group_names) == (True, is_multi_label, ["even", "odd"])
    batches = list(module.train_dataloader())
    workers = list(_module(dataset=AnnotatedSource(is_multi_label), num_workers=2).train_dataloader())
    for batch, other in zip(batches, workers, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)
        assert batch.extras.keys() == other.extras.keys() == {"boxes", "groups"}
        assert all(torch.equal(batch.extras[name], other.extras[name]) for name in batch.extras)
        assert torch.equal(batch.extras["groups"], batch.indices % 2)
        boxes = batch.extras["boxes"]
        assert boxes.dtype == torch.int64
        assert boxes.shape[0] == 4
        assert boxes.shape[2] == 5
        assert batch.labels.shape == ((4, 3) if is_multi_label else (4,))
        assert batch.labels.dtype == (torch.float32 if is_multi_label else torch.int64)
        for image, rows in zip(batch.images, boxes, strict=True):
            inside = torch.zeros(16, 16, dtype=torch.bool)
            for label, x0, y0, x1, y1 in rows.tolist():
                assert label >= 0 or (x0, y0, x1, y1) == (0, 0, 0, 0)
                inside[y0:y1, x0:x1] = True
            assert torch.equal(image[0] == 255, inside)


def test_val_batch_with_and_without_workers() -> None:
    source = AnnotatedSource()
    source.val = lambda: AnnotatedImages(40)
    serial, parallel = _module(dataset=source), _module(dataset=source, num_workers=2)
    parallel.val_dataloader()
    indices = list(range(30, 6, -1))
    one, other = serial.val_batch(indices), parallel.val_batch(indices)
    assert one.indices.tolist() == other.indices.tolist() == indices
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert all(torch.equal(one.extras[name], other.extras[name]) for name in ("boxes", "groups"))
    images, labels = serial.val_samples(indices)
    assert torch.equal(images, one.images)
    assert torch.equal(labels, one.labels)


def test_join_batches_pads_to_the_largest_number() -> None:
    samples = SeededDataset(AnnotatedImages(), plain())
    whole = collate(samples.__getitems__(range(9)), "augmentation.eval")
    parts = [collate(samples.__getitems__(indices), "augmentation.eval") for indices in ([0], [1, 2, 3], range(4, 9))]
    joined = join_batches(parts, "augmentation.eval")
    assert all(torch.equal(a, b) for a, b in zip(joined[:3], whole[:3], strict=True))
    assert all(torch.equal(joined.extras[name], whole.extras[name]) for name in ("boxes", "groups"))


def test_a_data_set_without_annotations_has_no_extras() -> None:
    batch = collate(SeededDataset(Digits(size=SIZE).val(), plain()).__getitems__([0, 1]), "augmentation.eval")
    assert batch.extras is None


def test_cache_and_transforms_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"^cache=device: annotated has boxes, .*: omit the key$"):
        _module(dataset=AnnotatedSource(cache="device"))
    with pytest.raises(ValueError, match=r"^augmentation\.train: TrivialAugmentWide"):
        _module(train_transform=imagenet_train(16, policy="ta_wide")).setup("fit")
    _module(train_transform=imagenet_train(16, policy="ta_wide")).setup("validate")


def test_class_map_maps_multi_hot_labels_and_boxes() -> None:
    source = AnnotatedSource()
    source.class_map = {"a": "x", "b": 0, "c": "z"}
    mapped = with_model_classes(source, ["x", "y", "z", "w"], "a model")
    assert (mapped.has_boxes, mapped.is_multi_label, mapped.group_names) == (True, True, ["even", "odd"])
    for index in range(12):
        _, label, annotations = AnnotatedImages()[index]
        _, mapped_label, mapped_annotations = mapped.train()[index]
        boxes = annotations.boxes
        classes = [0 if row[0] < 2 else 2 for row in boxes]
        assert mapped_label.tolist() == [float(c in classes) for c in range(4)]
        assert mapped_label.dtype == label.dtype
        assert mapped_annotations.boxes.tolist() == [
            [c, *row[1:]] for c, row in zip(classes, boxes.tolist(), strict=True)
        ]
        assert mapped_annotations.group == annotations.group
