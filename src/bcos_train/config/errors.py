"""Errors that the user can correct, as opposed to bugs."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "advice", "user_errors_at"]

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST), "move what is in its place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), "check the disk or the network drive"),
}


class UserError(ValueError):
    """An error that the user can correct. Entry points print only the message, without a traceback."""


def advice(error: OSError) -> str | None:
    """Return what to do about a file system that refuses to read or write; ``None``: it is another error."""
    return _ADVICE.get(error.errno or 0)


@contextmanager
def user_errors_at(key: str) -> Iterator[None]:
    """Turn a ``ValueError`` or a missing or locked file in the block into a :class:`UserError` that names the key.

    Args:
        key: Prefix of the message; ``""`` for messages that already name their key.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{key}: {message}" if key else message) from error
