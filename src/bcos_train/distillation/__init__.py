"""Distillation: a student learns a teacher's predictions (KD) and explanations (e²KD)."""

from bcos_train.distillation.losses import distillation_loss, explanation_similarity
from bcos_train.distillation.options import DistillationOptions
from bcos_train.distillation.teacher import Teacher, load_teacher

__all__ = ["DistillationOptions", "Teacher", "distillation_loss", "explanation_similarity", "load_teacher"]
