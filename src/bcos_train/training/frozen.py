"""Frozen teachers: describe the images that their maps belong to, and check that a run uses the same ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from bcos_train.augmentation import Augmentation
from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset import ImageDataset, SeededDataset
from bcos_train.dataset.classes import check_same_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.seeded import Transform
from bcos_train.dataset.subset import whole_dataset
from bcos_train.dataset.window import check_has_window, whole_image_view
from bcos_train.distillation import DistillationOptions, FrozenTeacher, load_teacher
from bcos_train.distillation.store import PARTS, Manifest, Part, PartInfo, Store
from bcos_train.task import FrozenDistillation
from bcos_train.training.config import TrainConfig

__all__ = [
    "build_frozen_distillation",
    "check_augmentation",
    "describe_samples",
    "one_line",
    "views",
]

#: Number of images by which other images than those of the maps are noticed, for data sets without a digest, too.
N_SAMPLES = 16
#: Tolerance of the mean colors in [0, 255]: decoders and resizing differ a little between versions.
COLOR_TOLERANCE = 2.0


def build_frozen_distillation(
    settings: TrainConfig, options: DistillationOptions, model: nn.Module, data: DataModule, num_classes: int
) -> FrozenDistillation:
    """Open the stored logits and maps, check that they are those of the run's images, and build the objective.

    The data module then loads them with the images.

    Args:
        num_classes: K of the model.

    Raises:
        UserError: The store is damaged or belongs to other images, another view, teacher or student, or the
            augmentation does more than crop and flip.
    """
    assert options.frozen is not None
    with user_errors_at(""):
        check_augmentation(settings.augmentation)
    if getattr(settings.dataset, "cache", None) is not None:
        raise UserError(f"dataset.cache={settings.dataset.cache}: cached images come without frozen maps: omit the key")  # type: ignore[attr-defined]
    with user_errors_at("distillation.frozen"):
        store = Store.open(Path(options.frozen))
        _check_images(store, data, settings.augmentation.eval)
        if store.manifest.num_classes != num_classes:
            raise ValueError(f"the teacher has {store.manifest.num_classes} classes, the student {num_classes}")
        positions = {part: _positions(store, part, data) for part in PARTS}
    with user_errors_at("distillation"):
        if options.teacher is not None:
            _check_teacher(store.manifest, options, num_classes)
        task = FrozenDistillation(settings.loss, FrozenTeacher(store, positions), options, model)
    data.train_lookup = task.teacher.train_lookup(with_maps=options.explanation_weight > 0)
    return task


def check_augmentation(augmentation: Augmentation) -> None:
    """Raise a ValueError if training images don't show a part of an unchanged image."""
    for key in ("mixup_alpha", "cutmix_alpha"):
        if (alpha := getattr(augmentation, key)) > 0:
            raise ValueError(
                f"augmentation.{key}={alpha}: frozen maps are those of single images, not of mixed ones: "
                f"augmentation.{key}=0"
            )
    check_has_window(augmentation.train, "augmentation.train")


def views(eval_transform: Transform) -> dict[Part, Transform]:
    """Return the teacher's view of the images by part: training images as a whole, validation images as evaluated.

    Maps of training images are cropped, so they cover the whole image. Those of validation images are compared with the
    student in the same view.

    Raises:
        ValueError: The transform does more than resize and crop the center.
    """
    return {"train": whole_image_view(eval_transform), "val": eval_transform}


def describe_samples(images: ImageDataset, view: Transform, indices: Sequence[int]) -> list[list[float]]:
    """Return index, label, height, width and mean red, green and blue of images in a view."""
    samples = SeededDataset(images, view)
    rows = []
    for index in indices:
        pixels, label, *_ = samples[index]
        assert not isinstance(label, np.ndarray), "a teacher is for one label per image"
        mean = [round(value, 2) for value in pixels.float().mean((1, 2)).tolist()]
        rows.append([index, label, pixels.shape[1], pixels.shape[2], *mean])
    return rows


def _check_images(store: Store, data: DataModule, eval_transform: Transform) -> None:
    manifest, folder = store.manifest, store.folder
    if manifest.dataset != data.dataset.name:
        raise ValueError(f"{folder} holds maps of dataset={manifest.dataset}, not of {data.dataset.name}")
    hint, inventory = "compute maps for this data set", data.inventory
    check_same_classes(data.class_names, manifest.class_names, f"the maps in {folder}", hint)
    for part, view in views(eval_transform).items():
        info, kind = manifest.parts[part], "training" if part == "train" else "validation"
        if one_line(view) != info.view:
            raise ValueError(
                f"{folder} holds maps of another view of the {kind} images, {info.view}; augmentation.eval gives "
                f"{one_line(view)}"
            )
        now = inventory[part]
        if now["count"] != info.inventory["count"]:
            raise ValueError(
                f"{folder} holds maps of a data set with {info.inventory['count']:,} {kind} images; there are "
                f"{now['count']:,}: set dataset.*, such as val_per_class, as for scripts/precompute_teacher.py"
            )
        if now["digest"] != info.inventory["digest"]:
            raise ValueError(f"{folder} holds maps of other {kind} images: their names, classes or settings differ")
        _check_samples(info, data.images(part), view, f"{folder} holds maps of other {kind} images")


def _check_samples(info: PartInfo, images: ImageDataset, view: Transform, problem: str) -> None:
    images, _ = whole_dataset(images)
    indices = [int(row[0]) for row in info.samples]
    for row, recorded in zip(describe_samples(images, view, indices), info.samples, strict=True):
        if row[1:4] != recorded[1:4] or np.abs(np.subtract(row[4:], recorded[4:])).max() > COLOR_TOLERANCE:
            text = "label {}, {}×{} pixels of mean color {:.0f} {:.0f} {:.0f}"
            raise ValueError(
                f"{problem}: image {row[0]} has {text.format(*row[1:])}, it had {text.format(*recorded[1:])}"
            )


def _positions(store: Store, part: Part, data: DataModule) -> np.ndarray:
    """Return the position in the store of each image that the run uses, int64 (M,)."""
    _, indices = whole_dataset(data.images(part))
    stored = store.indices[part]
    order = np.argsort(stored, kind="stable")
    positions = order[np.searchsorted(stored, indices, sorter=order).clip(max=len(stored) - 1)]
    if missing := int((stored[positions] != indices).sum()):
        kind = "training" if part == "train" else "validation"
        raise ValueError(
            f"{store.folder} holds maps of {len(stored):,} {kind} images, without {missing:,} of the {len(indices):,} "
            f"that are used: compute them with the same limit_{part} and dataset.*"
        )
    return positions


def _check_teacher(manifest: Manifest, options: DistillationOptions, num_classes: int) -> None:
    teacher = load_teacher(options, num_classes)
    is_same = (teacher.sha256, teacher.precision) == (manifest.teacher_sha256, manifest.teacher_precision)
    if not is_same:
        raise ValueError(
            f"teacher={options.teacher}: the maps in {options.frozen} are those of {manifest.teacher}, with other "
            "weights or precision; omit the teacher, or compute its maps"
        )


def one_line(transform: Transform) -> str:
    """Return a transform as one line of text."""
    return " ".join(str(transform).split())
