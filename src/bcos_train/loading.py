"""Load a trained classifier from a run, an export, a weights file or the official release.

Axes: N images, C input channels (6 for B-cos networks), H, W pixels, K classes.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from bcos_train.dataset.image import read_image, to_rgb
from bcos_train.explanation import Explanation, explain, is_explainable
from bcos_train.explanation.method.base import probability_function
from bcos_train.model.transform import InferenceTransform
from bcos_train.runs.folder import find_checkpoint
from bcos_train.runs.layout import CHECKPOINTS, RUN_CONFIG
from bcos_train.weights.build import build_from_source
from bcos_train.weights.model_options import check_options
from bcos_train.weights.source import WeightsSource, read_weights_source

__all__ = ["ImageLike", "LoadedClassifier", "Prediction", "load", "pad_class_names"]

ImageLike = Image.Image | str | os.PathLike[str]
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
}
Images = ImageLike | Sequence[ImageLike] | Tensor


@dataclass(frozen=True)
class Prediction:
    """Predictions for a batch.

    Attributes:
        logits: (N, K).
        probabilities: (N, K) in [0, 1]: softmax for models trained with cross-entropy; for binary cross-entropy, as for
            most B-cos models, sigmoids, which need not sum to 1.
        class_names: K names.
    """

    logits: Tensor
    probabilities: Tensor
    class_names: tuple[str, ...]

    @property
    def classes(self) -> Tensor:
        """(N,) int64, the class with the largest logit."""
        return self.logits.argmax(1)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the ``k`` most probable classes of each image, best first, as (class name, probability)."""
        order = self.logits.topk(min(k, self.logits.shape[1]), dim=1).indices.tolist()
        return [[(self.class_names[c], float(self.probabilities[n, c])) for c in row] for n, row in enumerate(order)]


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier in evaluation mode, with its preprocessing and class names.

    All methods that take images accept a PIL image, the path of an image file, a list of these, a uint8 tensor
    (N, 3, H, W) of RGB images (used at their original size), or a float tensor (N, C, H, W): the model's input.

    Attributes:
        model: (N, C, H, W) -> logits (N, K). It is switched to evaluation mode.
        name: Model name.
        class_names: K names; ``class 0``, ``class 1``, … by default.
        dataset: Name of the training data set, if known.
        origin: Source of the weights, in a few words.
        activation: ``"sigmoid"`` or ``"softmax"``: converts logits to probabilities; ``None``: the model's
            ``to_probabilities``.
        metrics: Recorded validation results of these weights: ``acc1`` and ``acc5`` in percent, ….
        recorded_class_names: Those that are recorded with the weights, with which a data set's are compared; ``None``:
            none are, so the class names are those of the training data set, as far as they are known.
        encoding: uint8 RGB (N, 3, H, W) -> the model's input (N, C, H, W), on the model's device; ``None``: the
            encoding of the model's inference transform.

    Raises:
        ValueError: The number of class names is not that of the model's classes, or another activation.
    """

    model: nn.Module
    name: str
    class_names: tuple[str, ...] = ()
    dataset: str | None = None
    origin: str = ""
    activation: str | None = None
    encoding: Callable[[Tensor], Tensor] | None = None
    recorded_class_names: tuple[str, ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.eval()
        n = int(getattr(self.model, "num_classes", len(self.class_names)))
        if not self.class_names:
            object.__setattr__(self, "class_names", pad_class_names((), n))
        if len(self.class_names) != n:
            raise ValueError(f"{len(self.class_names)} class names, but {self.name} has {n} classes")
        if self.activation not in (None, *_ACTIVATIONS):
            raise ValueError(f"activation={self.activation!r}: {' or '.join(_ACTIVATIONS)}")

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def preprocess(self, image: ImageLike) -> Tensor:
        """Resize and crop an image by the model's inference transform.

        Returns:
            (3, H, W) uint8 RGB. Transforms that don't separate cropping from encoding, such as those of timm's models,
            return the model's input (C, H, W) as float.

        Raises:
            ValueError: There is no such file, it is not an image, or its mode has no defined conversion to RGB.
        """
        transform = self.model.transform
        exif_orientation = isinstance(transform, InferenceTransform) and transform.exif_orientation
        if isinstance(image, (str, os.PathLike)):
            picture = read_image(image, exif_orientation)
        elif isinstance(image, Image.Image):
            picture = to_rgb(image, exif_orientation)
        else:
            raise ValueError(f"an image is a PIL image or a path, got {type(image).__name__}")
        if isinstance(transform, InferenceTransform):
            return transform.geometry(picture)
        return transform(picture)  # type: ignore[operator]

    def encode(self, images: Tensor) -> Tensor:
        """Convert images to the model's input, on the model's device.

        Args:
            images: uint8 RGB (N, 3, H, W), or the model's input (N, C, H, W) as float, which is returned unchanged.

        Returns:
            (N, C, H, W) float.

        Raises:
            ValueError: Another shape or type.
        """
        in_chans = int(getattr(self.model, "in_chans", 3))
        expected = 3 if images.dtype == torch.uint8 else in_chans
        is_valid = images.ndim == 4 and images.shape[1] == expected and len(images) > 0
        if not is_valid or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"images must be uint8 (N, 3, H, W) or float (N, {in_chans}, H, W), N >= 1, got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        images = images.to(self.device)
        if images.dtype != torch.uint8:
            return images
        if self.encoding is not None:
            return self.encoding(images)
        transform = self.model.transform
        if not isinstance(transform, InferenceTransform):
            raise ValueError(f"{self.name} has its own transform, which takes PIL images or paths, not uint8 tensors")
        # A copy: the transform itself stays on the CPU, where it takes PIL images.
        return copy.deepcopy(transform.encoding).to(self.device)(images)

    def prepare(self, images: Images) -> Tensor:
        """Preprocess and encode images: the model's input (N, C, H, W) on its device.

        Raises:
            ValueError: No images, images of different sizes after preprocessing, or as for :meth:`preprocess` and
                :meth:`encode`.
        """
        if isinstance(images, Tensor):
            return self.encode(images)
        batch = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)
        if not batch:
            raise ValueError("no images: expected at least one")
        crops = [self.preprocess(image) for image in batch]
        if len({crop.shape for crop in crops}) != 1:
            sizes = ", ".join("x".join(map(str, crop.shape[1:])) for crop in crops)
            raise ValueError(f"images must have the same size after the preprocessing of {self.name}, got {sizes}")
        return self.encode(torch.stack(crops))

    @torch.no_grad()
    def predict(self, images: Images) -> Prediction:
        """Classify images.

        Raises:
            ValueError: As for :meth:`prepare`.
        """
        logits = self.model(self.prepare(images))
        return Prediction(logits, self.to_probabilities(logits), self.class_names)

    def to_probabilities(self, logits: Tensor) -> Tensor:
        """Convert logits (N, K) to probabilities (N, K)."""
        convert = probability_function(self.model) if self.activation is None else _ACTIVATIONS[self.activation]
        return convert(logits)

    def explain(self, images: Images, target: Tensor | int | None = None) -> Explanation:
        """Explain a class of each image by its dynamic linear weights W(x).

        Args:
            images: As for :meth:`predict`.
            target: Classes to explain: (N,) integers, one for all images, or ``None`` for the predicted ones.

        Returns:
            Weights W(x) (N, C, H, W) and contribution maps (N, H, W); see
            :class:`bcos_train.explanation.Explanation`.

        Raises:
            ValueError: The model is not a B-cos network; a target out of range; or as for :meth:`prepare`.
        """
        if not is_explainable(self.model):
            raise ValueError(
                f"{self.name} is not a B-cos network, so it has no W(x); bcos_train.explanation.method has methods "
                "for other models"
            )
        return explain(self.model, self.prepare(images), target)


def load(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    options: Mapping[str, object] | None = None,
    checkpoint: str | None = None,
    use_ema: bool | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LoadedClassifier:
    """Load a trained classifier.

    >>> classifier = load("runs/digits/resnet20/default-1a2b3c4d")
    >>> load("resnet50").predict("dog.jpg").top(3)
    >>> load("weights.pth", model="resnet20", options={"b": 1.5})

    Args:
        source: A run folder, an exported folder, a weights file, or a model's name for its official weights.
        model: Model name, if the source doesn't describe its model; ``timm:<name>`` for one of timm's.
        options: Model options that the source doesn't specify.
        checkpoint: For a run folder: ``"best"``, ``"last"``, or the path of a checkpoint; ``None``: the run's final
            weights.
        use_ema: True for the averaged weights, False for the plain ones; ``None``: averaged if there are any.
        class_names: In the order of the outputs; ``None``: those of the source.
        device: Device of the model.
        progress: Show a download progress bar.

    Raises:
        ValueError: The source is missing, damaged or not weights; its model is unknown; or its weights don't fit.
    """
    if checkpoint is not None:
        source = _find_checkpoint(Path(source).expanduser(), checkpoint)
    weights = read_weights_source(source, use_ema, progress=progress).for_model(model, options or {})
    if weights.model_name is None:
        raise ValueError(f'{weights.label} doesn\'t specify its model: set model="NAME"')
    check_options(weights.model_name, weights.options)
    _check_preprocessing(weights)
    network = build_from_source(weights).to(device)
    if class_names is None:
        class_names = pad_class_names(weights.class_names_or_usual or (), int(network.num_classes))  # type: ignore[arg-type]
    return LoadedClassifier(
        network,
        weights.model_name,
        tuple(class_names),
        weights.dataset,
        weights.origin,
        weights.activation,
        recorded_class_names=weights.class_names,
        metrics=weights.metrics,
    )


def _find_checkpoint(folder: Path, which: str) -> Path:
    if not (folder / RUN_CONFIG).is_file():
        raise ValueError(f"checkpoint={which} needs a run folder, and {folder} has no {RUN_CONFIG}")
    return find_checkpoint(folder / CHECKPOINTS, which)


def _check_preprocessing(weights: WeightsSource) -> None:
    """Raise a ValueError if a run's transform can't be rebuilt: the model's default transform would be wrong."""
    is_run = weights.folder is not None and (weights.folder / RUN_CONFIG).is_file()
    if is_run and weights.preprocessing is None:
        raise ValueError(
            f"{weights.label}: the run's evaluation transform is not one of bcos_train (augmentation.eval and encoding "
            f"in its {RUN_CONFIG}); use bcos_train.create_model(…, weights=…) and apply that transform yourself"
        )


def pad_class_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the names of ``num_classes`` classes; a model may have more classes than its data set has names."""
    return (*names[:num_classes], *(f"class {k}" for k in range(len(names), num_classes)))
