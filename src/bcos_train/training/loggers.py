"""Loggers in addition to the CSV file, which is always written."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

WANDB_ID = ".wandb-id"


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
    """Log to Weights & Biases, under the name ``run_id``.

    The id of the run at W&B is stored in the folder, so that a run resumes there if and only if its folder is the same.
    """
    id_file = folder / WANDB_ID
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    return WandbLogger(
        name=run_id,
        id=id_file.read_text(),
        save_dir=str(folder),
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        mode=mode,
        resume="allow",
    )


def tensorboard_logger(*, folder: Path, run_id: str) -> Logger:
    """Log to TensorBoard event files, in the subfolder ``tensorboard`` of the run folder."""
    return TensorBoardLogger(save_dir=str(folder), name="tensorboard", version="", default_hp_metric=False)


def start(loggers: Iterable[Logger], config: Mapping[str, object]) -> None:
    """Log the config, which also connects to a logger's server.

    Raises:
        ValueError: W&B has no API key or can't reach its server.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams(dict(config))
        except Exception as error:
            if not type(error).__module__.startswith("wandb."):
                raise
            message = " ".join(str(error).split())
            raise ValueError(f"logger.wandb: {message} (logger.wandb.mode=offline needs no server)") from error


def close(loggers: Iterable[Logger]) -> None:
    """Finish W&B runs, which Lightning leaves open: the next run of a sweep in this process would log to them too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()
