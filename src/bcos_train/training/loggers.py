"""Loggers in addition to the CSV file, which is always written."""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from bcos_train.training.side_matters import has_failed, only_warn
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.terminal import printable

WANDB_ID = ".wandb-id"
#: Modes of W&B, the more restrictive the later.
Mode = Literal["online", "offline", "disabled"]
#: How long to wait for W&B's server before logging offline.
CONNECT_SECONDS = 5

_logger = logging.getLogger(__name__)


def wandb_logger(
    *,
    folder: Path,
    run_id: str,
    project: str = "bcos-train",
    entity: str | None = None,
    mode: Mode = "online",
    group: str | None = None,
    tags: list[str] | None = None,
) -> Logger:
    """Log to Weights & Biases, under the name ``run_id``.

    ``WANDB_MODE`` and ``WANDB_DISABLED`` are respected; without a connection to the server, the run is logged offline.
    The id of the run at W&B is stored in the folder, so that a run resumes there if and only if its folder is the same.
    """
    id_file = folder / WANDB_ID
    if not id_file.exists():
        with atomic_write(id_file) as temporary:
            temporary.write_text(secrets.token_hex(4))
    return WandbLogger(
        name=run_id,
        id=id_file.read_text(),
        save_dir=str(folder),
        project=project,
        entity=entity,
        group=group,
        tags=tags,
        mode=wandb_mode(mode, folder),
        resume="allow",
    )


def wandb_mode(mode: Mode, folder: Path) -> Mode:
    """Return the mode in which to log to W&B: the more restrictive of ``mode`` and the environment's.

    The environment is ``WANDB_MODE`` and ``WANDB_DISABLED``. Without a connection to the server the mode is offline,
    which is reported once, with the command to upload the run later.
    """
    asked = os.environ.get("WANDB_MODE", "").lower()
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        asked = "disabled"
    asked = {"dryrun": "offline"}.get(asked, asked)
    modes = get_args(Mode)
    chosen: Mode = modes[max(modes.index(mode), modes.index(asked) if asked in modes else 0)]
    if chosen == "online" and (problem := _connection_problem()):
        _logger.warning(
            "W&B: no connection to the server (%s), so this run is logged offline; to upload it later: "
            "wandb sync %s/wandb/offline-run-*",
            problem,
            printable(str(folder)),
        )
        return "offline"
    return chosen


def _connection_problem() -> str | None:
    """Return why W&B's server can't be reached within some seconds, or None; also None without a key for it."""
    import requests.utils
    import wandb

    url = str(wandb.setup().settings.base_url)
    if not (os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(url)):
        return None  # wandb says how to log in

    outcome: list[str | None] = [f"no answer from {url} within {CONNECT_SECONDS} s"]

    def connect() -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
            outcome[0] = None
        except requests.exceptions.SSLError:
            outcome[0] = None  # there is a server
        except requests.exceptions.RequestException as error:
            outcome[0] = f"{url}: {type(error).__name__}"

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return outcome[0]


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

            # A process that died was reported once.
            with contextlib.suppress(Exception) if has_failed(logger) else only_warn("closing W&B"):
                wandb.finish()
