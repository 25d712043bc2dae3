"""Describe an inference transform by values that JSON can hold."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from torchvision.transforms import v2

from bcos_train.augmentation import imagenet_eval, plain
from bcos_train.dataset.encoding import BcosEncoding, Standardize
from bcos_train.model.transform import InferenceTransform
from bcos_train.utils.json_types import JSONValue

__all__ = ["Preprocessing"]

T = TypeVar("T")

_GEOMETRIES: dict[str, Callable[..., v2.Compose]] = {
    "bcos_train.augmentation.imagenet_eval": imagenet_eval,
    "bcos_train.augmentation.plain": plain,
}
_ENCODINGS: dict[str, Callable[..., BcosEncoding | Standardize]] = {
    "bcos_train.dataset.BcosEncoding": BcosEncoding,
    "bcos_train.dataset.Standardize": Standardize,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing from a PIL image to the input ``(C, H, W)``.

    Args:
        resize_size: Length in pixels of the shorter side, or of both sides as ``(S, S)``; ``None``: no resizing.
        crop_size: Side in pixels of the center crop; ``None``: no crop.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        mean, std: Per channel, for standardized RGB; ``None``: ``[r, g, b, 1-r, 1-g, 1-b]`` in [0, 1].
        exif_orientation: Rotate and flip images as their EXIF tag says.
    """

    resize_size: int | tuple[int, int] | None = None
    crop_size: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    exif_orientation: bool = False

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the square input; ``None`` if it depends on the image."""
        if self.crop_size is not None:
            return self.crop_size
        return self.resize_size[0] if isinstance(self.resize_size, tuple) else None

    @classmethod
    def from_transform(cls, transform: object) -> "Preprocessing | None":
        """Describe a model's ``transform``; ``None`` if it is not an :class:`InferenceTransform`."""
        if not isinstance(transform, InferenceTransform):
            return None
        result = cls(exif_orientation=transform.exif_orientation)
        for step in transform.geometry.transforms:
            if isinstance(step, v2.Resize):
                size = step.size[0] if len(step.size) == 1 else (step.size[0], step.size[1])
                result = replace(result, resize_size=size, interpolation=step.interpolation.value)
            elif isinstance(step, v2.CenterCrop):
                result = replace(result, crop_size=step.size[0])
        encoding = transform.encoding
        if isinstance(encoding, Standardize):
            # Rounded to the decimal numbers that float32 approximates.
            mean, std = (tuple(round(v, 8) for v in x.flatten().tolist()) for x in (encoding.mean, encoding.std))
            result = replace(result, mean=mean, std=std)
        return result

    @classmethod
    def from_config(cls, augmentation: object, encoding: object, dataset: object = None) -> "Preprocessing | None":
        """Describe the evaluation transform of a run's config; ``None`` if it is not one of this package.

        Args:
            augmentation: The config's node ``augmentation``.
            encoding: The config's node ``encoding``.
            dataset: The config's node ``dataset``, if any.
        """
        if not isinstance(augmentation, Mapping):
            return None
        try:
            geometry = _build(_GEOMETRIES, augmentation["eval"])
            exif_orientation = isinstance(dataset, Mapping) and dataset.get("exif_orientation", False) is True
            return cls.from_transform(_transform(geometry, _build(_ENCODINGS, encoding), exif_orientation))
        except (KeyError, TypeError, ValueError):
            return None

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Preprocessing":
        """Invert :meth:`to_json`.

        Raises:
            ValueError: Unknown keys or invalid values.
        """
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            fields.pop("channels", None)
            preprocessing = cls(**fields)
            preprocessing.transform()
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"invalid preprocessing: {values}") from error
        return preprocessing

    def to_json(self) -> dict[str, JSONValue]:
        """Return the fields and, for readers, the channels of the input."""
        channels = ["r", "g", "b"] if self.mean is not None else ["r", "g", "b", "1-r", "1-g", "1-b"]
        return {"channels": channels, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}

    def transform(self) -> InferenceTransform:
        """Build the transform: PIL image -> ``(C, H, W)``."""
        steps: list[v2.Transform] = []
        if self.resize_size is not None:
            steps.append(v2.Resize(self.resize_size, interpolation=v2.InterpolationMode(self.interpolation)))
        if self.crop_size is not None:
            steps.append(v2.CenterCrop(self.crop_size))
        is_bcos = self.mean is None or self.std is None
        encoding = BcosEncoding() if is_bcos else Standardize(self.mean, self.std)  # type: ignore[arg-type]
        return _transform(v2.Compose([*steps, v2.PILToTensor()]), encoding, self.exif_orientation)

    def to_sentence(self) -> str:
        """Describe the preprocessing in a sentence."""
        size = self.resize_size
        first = f"Resize the shorter side to {size} pixels" if isinstance(size, int) else ""
        if isinstance(size, tuple):
            first = f"Resize to {size[0]} x {size[1]} pixels"
        steps = ["Apply the EXIF orientation"] if self.exif_orientation else []
        first = f"{first} ({self.interpolation}, antialiased)" if first else "Keep the image's size"
        steps.append(first[0].lower() + first[1:] if steps else first)
        if self.crop_size is not None:
            steps.append(f"crop the central {self.crop_size} x {self.crop_size} pixels")
        steps.append("scale to [0, 1]")
        if self.mean is not None and self.std is not None:
            steps.append(f"standardize RGB with mean {list(self.mean)} and std {list(self.std)}")
        else:
            steps.append("append the complements: the channels are [r, g, b, 1-r, 1-g, 1-b]")
        return ", ".join(steps) + "."


def _transform(
    geometry: v2.Compose, encoding: BcosEncoding | Standardize, exif_orientation: bool
) -> InferenceTransform:
    transform = InferenceTransform(None, 224, encoding, exif_orientation)
    transform.geometry = geometry
    return transform


def _build(builders: Mapping[str, Callable[..., T]], node: object) -> T:
    if not isinstance(node, Mapping):
        raise TypeError(f"expected a config node, got {node!r}")
    return builders[node["_target_"]](**{key: value for key, value in node.items() if key != "_target_"})
