"""Teachers: frozen classifiers in evaluation mode.

Axes: N images, C channels of the model's input, H, W pixels, K classes.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bcos_train.dataset.encoding import BcosEncoding, Standardize
from bcos_train.distillation.explanation import explain_by
from bcos_train.distillation.options import DistillationOptions, ExplanationKind
from bcos_train.loading import LoadedClassifier, load
from bcos_train.model import timm_model
from bcos_train.model.transform import InferenceTransform
from bcos_train.nn import cached_weights
from bcos_train.weights.model_options import TIMM, build_model

__all__ = ["OtherTeacher", "Teacher", "check_same_teacher", "load_teacher"]

RANDOM = "random"


class OtherTeacher(ValueError):
    """The teacher is not the one that a run was started with."""


class _FloatEncoding(Protocol):
    def encode(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier, which belongs to no module and is therefore neither trained, saved nor synchronized.

    Attributes:
        model: (N, C, H, W) -> logits (N, K), in evaluation mode.
        label: For messages: name and origin of the weights.
        encoding: RGB in [0, 1] (N, 3, H, W) -> (N, C, H, W).
        class_names: Those that are recorded with the weights; ``None``: none are.
        precision: ``"bf16"`` or ``None``.
    """

    model: nn.Module
    label: str
    encoding: _FloatEncoding
    class_names: tuple[str, ...] | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the state dict: names, types, shapes and values, whatever file they come from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint says about its teacher, for :func:`check_same_teacher`."""
        return {"label": self.label, "sha256": self.sha256}

    def predict(self, rgb: Tensor) -> Tensor:
        """Return the logits (N, K) of RGB images (N, 3, H, W) in [0, 1]."""
        with torch.no_grad(), self._autocast(rgb), cached_weights(self.model):
            logits: Tensor = self.model(self.encode(rgb))
        return logits

    def explain(self, rgb: Tensor, kind: ExplanationKind) -> tuple[Tensor, Tensor]:
        """Return the logits (N, K) of RGB images in [0, 1], and explanations of the predicted classes, detached."""
        with self._autocast(rgb):
            return explain_by(kind, self.model, self.encode(rgb))

    def encode(self, rgb: Tensor) -> Tensor:
        """Return the model's input (N, C, H, W), and move the model to its device."""
        if next(self.model.parameters()).device != rgb.device:
            self.model.to(rgb.device)
            if isinstance(self.encoding, nn.Module):
                self.encoding.to(rgb.device)
        return self.encoding.encode(rgb)

    def _autocast(self, rgb: Tensor) -> torch.autocast:
        return torch.autocast(rgb.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def check_same_teacher(current: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Raise :class:`OtherTeacher` unless the weights, or the stored maps, are the recorded ones.

    Args:
        current: :attr:`Teacher.record` of the current teacher.
        recorded: That of a checkpoint.
    """
    if current["sha256"] == recorded["sha256"]:
        return
    before, now = (f"{record['label']} (SHA-256 {record['sha256'][:12]}…)" for record in (recorded, current))
    raise OtherTeacher(
        f"distillation.teacher: the teacher changed since the last checkpoint: {now} instead of {before}; restore it, "
        "or use resume=false to train again in a new folder"
    )


def load_teacher(options: DistillationOptions, num_classes: int) -> Teacher:
    """Load the teacher that the options describe.

    Args:
        num_classes: K of the student.

    Raises:
        ValueError: The teacher doesn't exist, has no weights, or has another number of classes.
    """
    name, weights = options.teacher, options.teacher_weights
    assert name is not None, "the options have no teacher"
    if weights == RANDOM:
        if os.path.exists(name):
            raise ValueError(f"teacher_weights=random is for a model's name; teacher={name} is a file or folder")
        classifier = LoadedClassifier(build_model(name, {"num_classes": num_classes}), name)
        label = f"{name} with random weights, for trials"
    else:
        classifier = _load(name, weights)
        label = f"{classifier.name}, {classifier.origin}"
    if (count := len(classifier.class_names)) != num_classes:
        raise ValueError(f"teacher={name} has {count} classes, the student {num_classes}")
    return Teacher(
        classifier.model,
        label,
        _float_encoding(classifier),
        classifier.recorded_class_names,
        options.teacher_precision,
    )


def _load(name: str, weights: str | None) -> LoadedClassifier:
    if weights not in (None, "official"):
        return load(weights, model=name)
    if name.startswith(TIMM):
        model = timm_model(name.removeprefix(TIMM), pretrained=True)
        # With another number of classes, timm's classifier is a new one, without a word.
        own = getattr(model, "pretrained_cfg", {}).get("num_classes")
        if own != model.num_classes:
            classes = f"{own:,} classes" if own else "no classifier"
            raise ValueError(f"teacher={name}: timm's weights have {classes}; choose weights for 1,000, such as …_in1k")
        return LoadedClassifier(model, name, origin="timm's weights")
    if weights == "official" and Path(name).exists():
        raise ValueError(f"teacher_weights=official: teacher={name} is a file or folder, which has weights itself")
    return load(name)


def _float_encoding(classifier: LoadedClassifier) -> _FloatEncoding:
    """Return the encoding of the classifier's transform for float images."""
    transform = getattr(classifier.model, "transform", None)
    if isinstance(transform, InferenceTransform):
        return transform.encoding
    config = getattr(classifier.model, "pretrained_cfg", {})  # timm's
    if {"mean", "std"} <= config.keys():
        return Standardize(config["mean"], config["std"])
    if getattr(classifier.model, "in_chans", 3) == 6:
        return BcosEncoding()
    raise ValueError(f"teacher={classifier.name}: its transform has no known standardization")
