"""A mistake of the user's, as opposed to one in the code."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "blame"]


class UserError(ValueError):
    """Something the user can put right; the doors print its message alone, without a traceback."""


@contextmanager
def blame(path: str) -> Iterator[None]:
    """Turn a ``ValueError`` or a missing file in the block into a :class:`UserError` that names the config key."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path}: {message}" if path else message) from error
