"""Keep what accompanies a training (figures, explanation metrics, loggers) from ending it."""

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

from pytorch_lightning.loggers import Logger

from bcos_train.utils.terminal import printable

__all__ = ["has_failed", "only_warn", "protect"]

P = ParamSpec("P")

_logger = logging.getLogger(__name__)
#: Loggers that have failed once, and log nothing more.
_FAILED: "weakref.WeakSet[Logger]" = weakref.WeakSet()


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Turn an exception in the block into a warning of one line; signals still stop the run."""
    try:
        yield
    except Exception as error:
        _warn(what, error)


def protect(logger: Logger) -> Logger:
    """Let the first exception of a logger end its logging with a warning, instead of the run; returns ``logger``."""

    def guarded(method: Callable[P, object]) -> Callable[P, object]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> object:
            if has_failed(logger):
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                _FAILED.add(logger)
                _warn(f"{type(logger).__name__}, which logs nothing more,", error)
                return None

        return call

    for name in ("log_metrics", "log_image", "log_graph", "save", "after_save_checkpoint", "finalize"):
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger


def has_failed(logger: Logger) -> bool:
    """True if a protected logger has failed, which was reported."""
    return logger in _FAILED


def _warn(what: str, error: Exception) -> None:
    message = printable(" ".join(str(error).split()), keep="")[:300]
    _logger.warning("%s failed, the training continues: %s: %s", what, type(error).__name__, message)
