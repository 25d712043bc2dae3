"""Errors that the user can correct, as opposed to bugs."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "user_errors_at"]


class UserError(ValueError):
    """An error that the user can correct. Entry points print only the message, without a traceback."""


@contextmanager
def user_errors_at(key: str) -> Iterator[None]:
    """Turn a ``ValueError`` or a missing file in the block into a :class:`UserError` that names the config key.

    Args:
        key: Prefix of the message; ``""`` for messages that already name their key.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{key}: {message}" if key else message) from error
