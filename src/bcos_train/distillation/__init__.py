"""Distillation: a student learns a teacher's predictions (KD) and explanations (e²KD)."""

from bcos_train.distillation.explanation import choose_explanation, explain_by
from bcos_train.distillation.losses import distillation_loss, explanation_similarity
from bcos_train.distillation.options import DistillationOptions
from bcos_train.distillation.teacher import OtherTeacher, Teacher, check_same_teacher, load_teacher

__all__ = [
    "DistillationOptions",
    "OtherTeacher",
    "Teacher",
    "check_same_teacher",
    "choose_explanation",
    "distillation_loss",
    "explain_by",
    "explanation_similarity",
    "load_teacher",
]
