"""Loggers besides the CSV file, which is always written."""

from pathlib import Path
from typing import Literal

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger


def wandb_logger(
    *,
    folder: Path,
    run_id: str,
    project: str = "bcos-train",
    entity: str | None = None,
    mode: Literal["online", "offline", "disabled"] = "online",
    group: str | None = None,
    tags: list[str] | None = None,
) -> Logger:
    """Weights & Biases. ``run_id`` names the run there too, so that a resumed run goes on in the same place."""
    return WandbLogger(
        name=run_id,
        id=run_id.rpartition("-")[2],
        save_dir=str(folder),
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        mode=mode,
        resume="allow",
    )


def tensorboard_logger(*, folder: Path, run_id: str) -> Logger:
    """TensorBoard event files in the run folder, under ``tensorboard``."""
    return TensorBoardLogger(save_dir=str(folder), name="tensorboard", version="")
