"""Compare the classes of a data set with those of a trained model: the only place where that is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Annotations, Cache, ClassMap, ImageDataset, ImageSource, Label
from bcos_train.utils.suggestions import nearest, suggest

__all__ = ["OtherClasses", "check_same_classes", "with_model_classes"]


class OtherClasses(ValueError):
    """The classes of a data set are not those of a model."""


def check_same_classes(dataset: Sequence[str], model: Sequence[str], label: str, hint: str) -> None:
    """Raise :class:`OtherClasses` unless names and order are equal; the message names the first difference.

    Args:
        dataset: Class names of the data set.
        model: Class names of the model.
        label: What the message calls the model.
        hint: How to go on, for the message.
    """
    if (difference := _difference(dataset, model)) is not None:
        raise OtherClasses(f"dataset: the classes are not those of {label}: {difference}; {hint}")


def _difference(dataset: Sequence[str], model: Sequence[str]) -> str | None:
    """Return the first difference between class names in order, in words; ``None`` if there is none."""
    counts = "" if len(dataset) == len(model) else f" ({len(dataset)} classes, the model has {len(model)})"
    for label, (name, expected) in enumerate(zip_longest(dataset, model)):
        if name is None:
            return f"the data set has no class {label}, {expected!r} in the model{counts}"
        if expected is None:
            return f"class {label} of the data set, {name!r}, is unknown to the model{counts}"
        if name != expected:
            return f"class {label} is {name!r} in the data set, {expected!r} in the model{counts}"
    return None


def with_model_classes(
    source: ImageSource, class_names: Sequence[str] | None, label: str, hint: str | None = None
) -> ImageSource:
    """Return a data set whose labels are the class indices of a trained model.

    Without ``source.class_map``, names and order must be equal. With it, each class of the data set is the class of the
    model that the map names, by name or index (a number that is also a name is the name); classes that are not in the
    map keep their name.

    Args:
        source: The data set; its ``class_map`` is optional.
        class_names: Those recorded with the model, in the order of the outputs; ``None``: unknown, nothing is compared.
        label: What the error messages call the model.
        hint: Another way to go on if the classes differ, for the message.

    Returns:
        ``source``, or with a map a data set with the model's classes.

    Raises:
        OtherClasses: The classes differ.
        ValueError: A class in the map does not exist, or the model's classes are unknown.
    """
    class_map = getattr(source, "class_map", None)
    if class_map is None:
        if class_names is not None:
            hints = [_hint(source.class_names, class_names), *([] if hint is None else [hint])]
            check_same_classes(source.class_names, class_names, label, "; ".join(hints))
        return source
    if class_names is None:
        raise ValueError(f"dataset.class_map: the class names of {label} are unknown, so nothing can be mapped to them")
    names = {str(name): target for name, target in class_map.items()}
    for name in names:
        if name not in source.class_names:
            raise ValueError(
                f"dataset.class_map.{name}: the data set has no such class{suggest(name, source.class_names)}"
            )
    labels = []
    for i, name in enumerate(source.class_names):
        is_same = name not in names and [name] == list(class_names[i : i + 1])
        labels.append(i if is_same else _find(name, names.get(name, name), class_names, label))
    return _MappedSource(source, list(class_names), labels)


def _find(name: str, target: str | int, class_names: Sequence[str], label: str) -> int:
    """Return the index of the model's class ``target``, the name or index given for the data set's class ``name``."""
    if (count := list(class_names).count(str(target))) > 1:  # ImageNet has two classes "crane"
        raise ValueError(f"dataset.class_map.{name}={target}: {label} has {count} classes of this name: give the index")
    if count:
        return list(class_names).index(str(target))
    if isinstance(target, int) and 0 <= target < len(class_names):
        return target
    near = f" from 0 to {len(class_names) - 1}" if isinstance(target, int) else suggest(target, class_names)
    raise ValueError(f"dataset.class_map.{name}={target}: {label} has no such class{near}")


def _hint(names: Sequence[str], class_names: Sequence[str]) -> str:
    """Return how to map the classes."""
    name = next((name for name in names if name not in class_names), None)
    if name is None:
        return "dataset.class_map={} maps classes of the same name"
    if re.fullmatch(r"n\d{8}", name):
        return "for ImageNet's folders, use dataset=imagenet, which knows the names of their classes"
    target = next(iter(nearest(name, class_names, n=1)), class_names[0])
    # As Hydra reads them.
    name, target = (re.sub(r"([\\()\[\]{}:=,])", r"\\\1", text) for text in (name, target))
    return f"rename the folders, or map each class to one of the model, as in 'dataset.class_map={{{name}: {target}}}'"


class _MappedSource:
    """A data set with the class names of a model.

    Args:
        source: The data set.
        class_names: Those of the model.
        labels: The model's label of each class of the data set.
    """

    def __init__(self, source: ImageSource, class_names: list[str], labels: Sequence[int]) -> None:
        self.name = source.name
        self.cache: Cache | None = getattr(source, "cache", None)
        self.class_map: ClassMap | None = None  # it has been applied
        self.max_skipped: float = getattr(source, "max_skipped", 0.0)
        self.is_multi_label = bool(getattr(source, "is_multi_label", False))
        self.has_boxes = bool(getattr(source, "has_boxes", False))
        self.group_names: list[str] | None = getattr(source, "group_names", None)
        self.class_names = class_names
        self._source = source
        self._labels = labels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None:
        self._source.prepare()

    def train(self) -> ImageDataset:
        return _MappedLabels(self._source.train(), self._labels, self.num_classes)

    def val(self) -> ImageDataset:
        return _MappedLabels(self._source.val(), self._labels, self.num_classes)


class _MappedLabels(Dataset[tuple[Image.Image, int] | tuple[Image.Image, Label, Annotations]]):
    def __init__(self, images: ImageDataset, labels: Sequence[int], num_classes: int) -> None:
        self._images = images
        self._labels = np.array(labels)
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._images)  # type: ignore[arg-type]  # map-style data sets have a length

    def digest(self) -> str | None:
        digest = getattr(self._images, "digest", None)
        return None if digest is None else str(digest())

    def __getitem__(self, index: int) -> tuple[Image.Image, int] | tuple[Image.Image, Label, Annotations]:
        image, label, *rest = self._images[index]
        if not rest:
            return image, self._map(label)  # type: ignore[return-value]  # annotated if it is multi-hot
        (annotations,) = rest
        boxes = annotations.boxes
        if boxes is not None:
            boxes = np.column_stack([self._labels[boxes[:, 0]], boxes[:, 1:]])
        return image, self._map(label), Annotations(boxes, annotations.group)

    def _map(self, label: Label) -> Label:
        if not isinstance(label, np.ndarray):
            return int(self._labels[label])
        mapped = np.zeros(self._num_classes, dtype=label.dtype)
        mapped[self._labels[label > 0]] = 1  # several classes may become one
        return mapped
