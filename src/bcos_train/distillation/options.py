"""The config group ``distillation``."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["DistillationOptions", "ExplanationKind"]

#: What is compared: W(x), the contributions of pixels (summed over channels), or Grad-CAM of the last stage.
ExplanationKind = Literal["weights", "contributions", "grad_cam"]
_KINDS = get_args(ExplanationKind)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Loss: ``ground_truth_weight`` L + ``kd_weight`` L_KD + ``explanation_weight`` L_explanation.

    Args:
        teacher: A model's name (``timm:<name>`` for one of timm's), a run folder, an exported folder or a weights file.
            ``None``: the one of ``frozen``.
        teacher_weights: For a name: ``"official"``, the path of a weights file, or ``"random"`` for trials; ``None``:
            official.
        teacher_precision: ``"bf16"`` computes the teacher in bfloat16; ``None``: in float32.
        temperature: τ of the logits.
        ground_truth_weight: Weight of the training's own loss, which is always logged.
        kd_weight: Weight of the divergence from the teacher's predictions.
        explanation_weight: λ, weight of 1 - cosine of the explanations of the teacher's predicted class. With 0 nothing
            is explained.
        explanation: ``"weights"``, ``"contributions"`` (input x gradient for a standard network) or ``"grad_cam"``
            (resized to the image); ``None``: W(x) for two B-cos networks with the same encoding, Grad-CAM for two
            standard ResNets, else contributions.
        explanation_every_n_steps: Compare explanations in every n-th step only, with the same λ.
        frozen: Folder with the teacher's logits and maps of all images, which replace the teacher; ``None``: none.

    Raises:
        ValueError: A value is out of range, or there is neither a teacher nor a folder.
    """

    teacher: str | None
    teacher_weights: str | None = None
    teacher_precision: Literal["bf16"] | None = None
    temperature: float = 1.0
    ground_truth_weight: float = 0.0
    kd_weight: float = 1.0
    explanation_weight: float = 0.0
    explanation: ExplanationKind | None = None
    explanation_every_n_steps: int = 1
    frozen: str | None = None

    def __post_init__(self) -> None:
        if self.teacher is None and self.frozen is None:
            raise ValueError("teacher=null: give a teacher, or a folder with its maps (distillation=e2kd_frozen)")
        for name in ("teacher_weights", "teacher_precision"):
            if self.teacher is None and (choice := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={choice} has no effect without teacher=…: {self.frozen} holds the teacher's maps"
                )
        if "" in (self.teacher, self.frozen):
            raise ValueError("teacher and frozen can't be empty: is a shell variable not set?")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: a number above 0")
        for name in ("ground_truth_weight", "kd_weight", "explanation_weight"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name}={value}: at least 0")
        if not (self.ground_truth_weight or self.kd_weight or self.explanation_weight):
            raise ValueError("ground_truth_weight, kd_weight and explanation_weight are all 0: nothing to minimize")
        if self.explanation not in (None, *_KINDS):
            raise ValueError(f"explanation={self.explanation}: one of {', '.join(_KINDS)}")
        if self.teacher_precision not in (None, "bf16"):
            raise ValueError(f"teacher_precision={self.teacher_precision}: null (float32) or bf16")
        if self.explanation_every_n_steps < 1:
            raise ValueError(f"explanation_every_n_steps={self.explanation_every_n_steps}: at least 1")
