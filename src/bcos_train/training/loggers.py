"""Loggers besides the CSV file, which is always written."""

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

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
    """Weights & Biases, under the name ``run_id``.

    The run's id there is kept in the folder: a resumed run goes on in the same place, and one in another folder, of
    whatever name, never does.
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
    """TensorBoard event files in the run folder, under ``tensorboard``."""
    return TensorBoardLogger(save_dir=str(folder), name="tensorboard", version="", default_hp_metric=False)


def start(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Hand the config over, which is also where a logger that needs a server finds out that it has none.

    Raises:
        ValueError: W&B wants a key or a server that it doesn't have.
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
    """End what Lightning leaves open: a later run in this process, as in a sweep, would log into the same W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()
