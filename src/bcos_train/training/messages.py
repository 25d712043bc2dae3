"""Messages of a run: mistakes in one line, and nothing from Lightning that doesn't apply."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from bcos_train.config import UserError
from bcos_train.config.errors import advice
from bcos_train.dataset import ImageSizeMismatch, NotCacheable, UnreadableImage
from bcos_train.dataset.classes import OtherClasses
from bcos_train.dataset.storage.tar_index import BadShard
from bcos_train.dataset.unreadable import TooManyUnreadable
from bcos_train.distillation.store import UnreadableMaps
from bcos_train.runs.checkpoint import DamagedCheckpoint
from bcos_train.runs.launcher import rank
from bcos_train.training.callbacks.checkpoint import UnknownMonitor

__all__ = ["as_user_errors", "silence_lightning"]


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Convert exceptions that are raised while reading data or writing results to :class:`UserError`."""
    try:
        yield
    except (ImageSizeMismatch, UnreadableImage, UnreadableMaps, TooManyUnreadable, BadShard) as error:
        # An error in a worker process contains its traceback; the message is in the last line.
        raise UserError(str(error).strip().splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]) from error
    except NotCacheable as error:
        raise UserError(f"dataset: {error}") from error
    except (DamagedCheckpoint, OtherClasses, UnknownMonitor) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if (hint := advice(error)) is None:
            raise
        raise UserError(f"{error}: {hint} and run the same command again; the checkpoints are unchanged") from error


def silence_lightning() -> None:
    """Suppress messages of Lightning that the banner replaces or that don't apply."""
    for package in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    if rank() > 0:  # one line about the data set, not one from each process
        logging.getLogger("bcos_train").setLevel(logging.ERROR)
    for message in (
        ".*sync_dist=True.*",  # metrics logged on rank 0 are already reduced over the processes
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",
        ".*`srun` command is available.*",  # what a launcher has to start is checked before
    ):
        warnings.filterwarnings("ignore", message=message)
