"""Distillation: a student learns a teacher's predictions (KD) and explanations (e²KD)."""

from bcos_train.distillation.explanation import (
    check_stored_explanation,
    choose_explanation,
    choose_stored_explanation,
    explain_by,
)
from bcos_train.distillation.frozen import FrozenTeacher, crop_maps
from bcos_train.distillation.losses import distillation_loss, explanation_similarity
from bcos_train.distillation.options import DistillationOptions
from bcos_train.distillation.teacher import OtherTeacher, Teacher, check_same_teacher, load_teacher

__all__ = [
    "DistillationOptions",
    "FrozenTeacher",
    "OtherTeacher",
    "Teacher",
    "check_same_teacher",
    "check_stored_explanation",
    "choose_explanation",
    "choose_stored_explanation",
    "crop_maps",
    "distillation_loss",
    "explain_by",
    "explanation_similarity",
    "load_teacher",
]
