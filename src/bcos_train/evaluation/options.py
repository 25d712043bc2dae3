"""Options of explanation measurements: methods, metrics and their settings, as in ``configs/explanation``."""

import inspect
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Literal, get_args

from bcos_train.explanation.method import METHODS, Method, make_method
from bcos_train.utils.suggestions import join_words, suggest

__all__ = [
    "BOX_METRICS",
    "IMAGE_METRICS",
    "METRICS",
    "ExplanationOptions",
    "GridPointingOptions",
    "MethodName",
    "MetricName",
    "PerturbationOptions",
    "StabilityOptions",
]

#: Keys of :data:`bcos_train.explanation.method.METHODS`, spelled out so that a config can be checked by its types.
MethodName = Literal[
    "bcos",
    "bcos_relative",
    "ixg",
    "gradient",
    "int_grad",
    "guided_backprop",
    "deep_lift",
    "grad_cam",
    "smooth_grad",
    "lime",
    "rise",
    "occlusion5",
    "occlusion9",
    "occlusion13",
    "attention_rollout",
]
MetricName = Literal[
    "grid_pointing",
    "deletion",
    "insertion",
    "pixel_perturbation",
    "sparsity",
    "shift_stability",
    "noise_stability",
    "completeness",
    "alignment",
    "energy_pointing",
    "iou",
]
#: All metrics: ours, and those that :func:`bcos_train.evaluation.register_metric` adds.
METRICS: list[str] = list(get_args(MetricName))
#: Metrics that need boxes. They explain all classes with a box, not the predicted one.
BOX_METRICS = ("energy_pointing", "iou")
#: Metrics that score the explanation of the predicted class of a single image.
IMAGE_METRICS = tuple(name for name in METRICS if name not in ("grid_pointing", "alignment", *BOX_METRICS))


@dataclass(frozen=True, kw_only=True)
class GridPointingOptions:
    """The grid pointing game; see :mod:`bcos_train.metric.grid_pointing`.

    Args:
        n: Cells along each side of a grid.
        n_grids: Number of grids; fewer if there are not enough images.
        smooth: Odd window in pixels of the average pooling of a map before it is scored; 1: none. The official
            evaluation uses 1 and 15 at 224 pixels; at 32 pixels a window of 15 would be half a cell.
        threshold: Use images that are classified correctly with more than this confidence; 0: all such images.
        rescale: Shrink the cells by n, so that a grid is as large as an image.
        stride: Explain the grid through a sliding window of an image's size with this stride in pixels, for models
            with a fixed input size; ``None``: explain the grid as a whole.
        seed: Seeds the draw of each grid's classes.

    Raises:
        ValueError: A number is out of range, or both ``rescale`` and ``stride`` are given.
    """

    n: int
    n_grids: int
    smooth: int
    threshold: float
    rescale: bool
    stride: int | None
    seed: int

    def __post_init__(self) -> None:
        _at_least(1, "explanation.grid_pointing", n=self.n, n_grids=self.n_grids, smooth=self.smooth)
        _at_least(0, "explanation.grid_pointing", seed=self.seed)
        if self.smooth % 2 == 0:
            raise ValueError(f"explanation.grid_pointing.smooth={self.smooth}: an odd number of pixels")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"explanation.grid_pointing.threshold={self.threshold}: between 0 and 1")
        if self.stride is not None:
            _at_least(1, "explanation.grid_pointing", stride=self.stride)
            if self.rescale:
                raise ValueError("explanation.grid_pointing: rescale=true or stride=…, not both")


@dataclass(frozen=True, kw_only=True)
class PerturbationOptions:
    """Deletion, insertion and pixel perturbation; see :mod:`bcos_train.metric.perturbation`.

    Args:
        block: Side in pixels of the replaced blocks.
    """

    block: int

    def __post_init__(self) -> None:
        _at_least(1, "explanation.perturbation", block=self.block)


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """Stability under small shifts and under noise; see :mod:`bcos_train.metric.stability`.

    Args:
        shift: Shift of the image in each direction, in pixels.
        noise_std: Standard deviation of the noise, in units of the model's input.
        noise_samples: Number of noisy copies of each image.
    """

    shift: int
    noise_std: float
    noise_samples: int

    def __post_init__(self) -> None:
        _at_least(1, "explanation.stability", shift=self.shift, noise_samples=self.noise_samples)
        if not self.noise_std > 0:
            raise ValueError(f"explanation.stability.noise_std={self.noise_std}: more than 0")


@dataclass(frozen=True, kw_only=True)
class ExplanationOptions:
    """Config group ``explanation`` of ``train.py`` and ``evaluate.py``.

    Args:
        methods: Names of explanation methods.
        metrics: Names of metrics. ``alignment`` is a property of the model, the others are measured for each method.
            :data:`BOX_METRICS` need a data set with boxes.
        n_images: Number of validation images for all metrics but the grid pointing game, always the same ones. The
            predicted class is explained; for :data:`BOX_METRICS` each class with a box.
        batch_size: Images per batch; a grid counts as n² images, since it has as many pixels.
        every_n_epochs: Training epochs between measurements; the last epoch is always measured. The grid pointing game
            needs an epoch with a validation, which determines the correctly classified images.
        gallery_images: Number of validation images in the training's gallery; 0: no gallery.
        method_options: Settings per method, such as ``{int_grad: {n_steps: 20}}``.

    Raises:
        ValueError: A number is below its minimum, or a method lacks an option.
    """

    methods: list[MethodName]
    metrics: list[str]
    n_images: int
    batch_size: int
    every_n_epochs: int
    gallery_images: int
    grid_pointing: GridPointingOptions
    perturbation: PerturbationOptions
    stability: StabilityOptions
    method_options: dict[str, dict[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(
            1, "explanation", n_images=self.n_images, batch_size=self.batch_size, every_n_epochs=self.every_n_epochs
        )
        _at_least(0, "explanation", gallery_images=self.gallery_images)
        chosen: tuple[tuple[str, Sequence[str], Collection[str]], ...] = (
            ("methods", self.methods, METHODS),
            ("metrics", self.metrics, METRICS),
        )
        for kind, names, allowed in chosen:
            for name in names:
                if name not in allowed:
                    listed = join_words(allowed, "and", len(allowed))
                    raise ValueError(f"explanation.{kind}: {name!r}{suggest(name, allowed)}; there are {listed}")
        of_methods = [name for name in self.metrics if name != "alignment"]
        if of_methods and not self.methods:
            raise ValueError(f"explanation.metrics: {of_methods[0]} of no method; set explanation.methods=[bcos], too")
        for name, options in self.method_options.items():
            try:
                make_method(name, **options)
            except (ValueError, TypeError) as error:
                raise ValueError(f"explanation.method_options.{name}: {error}") from error

    def check_boxes(self, has_boxes: bool, dataset: str) -> None:
        """Raise a ValueError if a metric needs boxes and the data set has none."""
        if not has_boxes and (names := [name for name in BOX_METRICS if name in self.metrics]):
            raise ValueError(f"explanation.metrics: {names[0]} needs boxes, which {dataset} doesn't have")

    def make_methods(self) -> dict[str, Method]:
        """Build the chosen methods by name, in the given order, each once."""
        return {name: make_method(name, **self.method_options.get(name, {})) for name in self.methods}

    def settings_of(self, metric: str) -> Mapping[str, object]:
        """Return the settings that change the scores of this metric."""
        if metric == "grid_pointing":
            return vars(self.grid_pointing)
        if metric in ("deletion", "insertion", "pixel_perturbation"):
            return vars(self.perturbation)
        if metric == "shift_stability":
            return {"shift": self.stability.shift}
        if metric == "noise_stability":
            return {"std": self.stability.noise_std, "n_samples": self.stability.noise_samples}
        return {}


def _config_signature(node: Mapping[str, object]) -> inspect.Signature:
    """Return the signature with the registered metrics as the choices of ``metrics``."""
    signature = inspect.signature(ExplanationOptions)
    # Through operator.getitem, since type checkers allow no values in a Literal that are only known at run time.
    choices = GenericAlias(list, (operator.getitem(Literal, tuple(METRICS)),))
    parameters = signature.parameters | {"metrics": signature.parameters["metrics"].replace(annotation=choices)}
    return signature.replace(parameters=list(parameters.values()))


ExplanationOptions.config_signature = staticmethod(_config_signature)  # type: ignore[attr-defined]


def _at_least(least: int, path: str, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{path}.{name}={value}: at least {least}")
