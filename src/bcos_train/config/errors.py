"""Mistakes of users, as opposed to faults in the code."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "user_errors_at"]


class UserError(ValueError):
    """Something that the user can correct. Entry points print the message alone, without a traceback."""


@contextmanager
def user_errors_at(key: str) -> Iterator[None]:
    """Turn a ``ValueError`` or a missing file in the block into a :class:`UserError` that names the config key.

    Args:
        key: Put before the message; ``""`` for a message that already names its key.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{key}: {message}" if key else message) from error
