"""The annotated objects of an evaluation: pairs of an image and a class with boxes."""

from dataclasses import dataclass

from torch import Tensor

from bcos_train.evaluation.subject import Subject
from bcos_train.metric import boxes_to_masks

__all__ = ["BoxedObject", "find_objects", "mean_box_share", "object_masks"]


@dataclass(frozen=True)
class BoxedObject:
    """A class in an image.

    Attributes:
        image: Index in the validation set.
        label: Index of the class.
        boxes: Its boxes [x0, y0, x1, y1] in pixels, half-open.
    """

    image: int
    label: int
    boxes: list[list[int]]


def find_objects(subject: Subject, batch_size: int) -> list[BoxedObject]:
    """Return all classes with a box in each of the subject's images; empty if the data set has no boxes.

    Boxes without a pixel don't count.
    """
    objects: list[BoxedObject] = []
    for start in range(0, len(subject.images) if subject.boxes is not None else 0, batch_size):
        images = list(subject.images[start : start + batch_size])
        assert subject.boxes is not None
        for image, rows in zip(images, subject.boxes(images).tolist(), strict=True):
            boxes: dict[int, list[list[int]]] = {}
            for label, x0, y0, x1, y1 in rows:
                if label >= 0 and x0 < x1 and y0 < y1:
                    boxes.setdefault(label, []).append([x0, y0, x1, y1])
            objects += [BoxedObject(image, label, boxes[label]) for label in sorted(boxes)]
    return objects


def object_masks(subject: Subject, objects: list[BoxedObject]) -> Tensor:
    """Return (N, H, W) bool, True inside the boxes of each object."""
    height, width = subject.pictures([objects[0].image]).shape[2:]
    return boxes_to_masks([item.boxes for item in objects], height, width)


def mean_box_share(subject: Subject, objects: list[BoxedObject], batch_size: int) -> float:
    """Return the mean share of an image inside the boxes of an object: the scores of a uniform map."""
    batches = [objects[start : start + batch_size] for start in range(0, len(objects), batch_size)]
    return sum(float(object_masks(subject, batch).float().mean((1, 2)).sum()) for batch in batches) / len(objects)
