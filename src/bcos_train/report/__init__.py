"""Figures of a run."""

from bcos_train.report.gallery import gallery, save_gallery

__all__ = ["gallery", "save_gallery"]
