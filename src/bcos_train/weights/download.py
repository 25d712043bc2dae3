"""Official weights: downloaded once, verified at each use.

A file is looked up in the folder named by ``BCOS_WEIGHTS``, for machines without a network, or else in torch.hub's
folder (``$TORCH_HOME/hub/checkpoints``), which it is downloaded to if missing. It is used only if its SHA-256 begins
with the digits in its name. A download is written to a temporary file beside its target and renamed once it is complete
and verified; an interrupted download resumes where it stopped.

``torch.hub.download_url_to_file`` verifies and renames too, but the largest files have 700 MB and it starts again after
each broken connection, waits forever for a server that stalls (it sets no timeout), retries nothing, and downloads once
per process when several processes need the same file.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch.hub
from filelock import FileLock
from torch import Tensor

from bcos_train.utils.files import file_sha256
from bcos_train.weights.files import read_weights
from bcos_train.weights.records import ZooRecord, find_record

__all__ = ["MIRROR", "WeightsError", "download_official", "load_official"]

#: Environment variable that names a folder of official files.
MIRROR = "BCOS_WEIGHTS"
#: Seconds to wait before each further attempt after a broken download.
PAUSES = (1.0, 2.0, 4.0)
#: Seconds without data after which a connection counts as broken.
TIMEOUT = 30.0
_CHUNK = 1 << 20
_MIRROR_HINT = f"{MIRROR}=<folder> uses files that are already there"


class WeightsError(ValueError):
    """Official weights are unavailable; the message says why, and what to do."""


class _BrokenDownload(Exception):
    """The download broke off; another attempt may succeed."""


def load_official(name: str, progress: bool = True) -> dict[str, Tensor]:
    """Load the official state dict of a model.

    Raises:
        ValueError: The model is unknown or has no official weights, or they are unavailable (:class:`WeightsError`).
    """
    return read_weights(download_official(find_record(name), progress))[0]


def download_official(record: ZooRecord, progress: bool = True) -> Path:
    """Return the verified file of a record, downloading it if necessary.

    Concurrent processes download it only once.

    Args:
        record: The record.
        progress: Show a download progress bar on stderr.

    Raises:
        WeightsError: The file is missing from the folder named by ``BCOS_WEIGHTS``, differs from the published one or
            is missing on the server; or the server can't be reached, or the file can't be written.
    """
    if mirror := os.environ.get(MIRROR):
        return _find_in_mirror(Path(mirror).expanduser(), record)
    path = Path(torch.hub.get_dir()).expanduser() / "checkpoints" / record.file
    if _is_verified(path, record):
        return path
    with _write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not _is_verified(path, record):  # another process may have fetched it meanwhile
                _download(record, path, progress)
    return path


def _find_in_mirror(folder: Path, record: ZooRecord) -> Path:
    path = folder / record.file
    if not folder.is_dir():
        raise WeightsError(
            f"{MIRROR}={folder}: no such folder; name one with {record.file}, or unset it to download the file"
        )
    if not path.is_file():
        raise WeightsError(f"{MIRROR}: no file {path}; put it there, or unset {MIRROR} to download {record.url}")
    if not _is_verified(path, record):
        raise WeightsError(
            f"{MIRROR}: {path} is not the published file: its SHA-256 doesn't begin with {record.sha256}"
        )
    return path


def _is_verified(path: Path, record: ZooRecord) -> bool:
    try:
        return file_sha256(path).startswith(record.sha256)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise WeightsError(f"can't read {path}: {error.strerror}; {_MIRROR_HINT}") from error


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a WeightsError."""
    try:
        yield
    except OSError as error:
        text = f"can't write the weights to {folder}: {error.strerror or error}"
        raise WeightsError(f"{text}; TORCH_HOME=<folder> selects another place, {_MIRROR_HINT}") from error


def _download(record: ZooRecord, path: Path, progress: bool) -> None:
    """Download the file to ``path``; the caller holds the lock."""
    part = path.with_name(f".{path.name}.part")
    for pause in (*PAUSES, None):
        try:
            is_whole = _fetch(record.url, part, progress)
            digest = file_sha256(part)
            if digest.startswith(record.sha256):
                os.replace(part, path)
                return
            part.unlink()
            if is_whole:
                raise WeightsError(
                    f"{record.url} is not the published file: its SHA-256 begins with "
                    f"{digest[: len(record.sha256)]}, not {record.sha256}; try again later, or {_MIRROR_HINT}"
                )
            problem = "its parts don't fit together"  # the resumed part belonged to another file
        except _BrokenDownload as error:
            problem = str(error)
        if pause is not None:
            time.sleep(pause)
    raise WeightsError(
        f"downloading {record.url} broke off {len(PAUSES) + 1} times ({problem}); the same command resumes where "
        f"it stopped, and {_MIRROR_HINT}"
    )


def _fetch(url: str, part: Path, progress: bool) -> bool:
    """Append the missing rest of the file at ``url`` to ``part``.

    Returns:
        True if the whole file was downloaded by this call.

    Raises:
        _BrokenDownload: The connection was lost, or the server reports an internal error.
        WeightsError: The server has no such file or can't be reached.
        OSError: ``part`` can't be written.
    """
    begin = part.stat().st_size if part.exists() else 0
    with closing(_open(url, begin)) as response:
        if response.status != 206:  # the server ignored the requested range and sends the whole file
            begin = 0
        total = _length(response, begin)
        with part.open("r+b" if begin else "wb") as file:
            file.truncate(begin)
            file.seek(begin)
            try:
                _copy(response, file, url, begin, total, progress)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                part.unlink()  # it would keep filling the disk
                raise
            if total is not None and file.tell() != total:
                raise _BrokenDownload(f"received {file.tell():,} of {total:,} bytes")
    return begin == 0


def _open(url: str, begin: int) -> HTTPResponse:
    """Request the file from byte ``begin`` on."""
    request = Request(url, headers={"User-Agent": "bcos-train"} | ({"Range": f"bytes={begin}-"} if begin else {}))
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and begin:  # nothing left to send: the part is complete, or belongs to another file
            return _open(url, 0)
        if error.code in (408, 429) or error.code >= 500:
            raise _BrokenDownload(f"HTTP {error.code} {error.reason}") from error
        raise WeightsError(f"{url}: the server answered {error.code} {error.reason}; {_MIRROR_HINT}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (ConnectionResetError, TimeoutError, HTTPException)):
            raise _BrokenDownload(str(reason)) from error
        raise WeightsError(f"no connection for {url}: {reason}; without a network, {_MIRROR_HINT}") from error


def _length(response: HTTPResponse, begin: int) -> int | None:
    """Return the length of the whole file in bytes, if the server sends it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != begin:
            raise _BrokenDownload(f"the server sent another part of the file than the one from byte {begin} on")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return None if length is None else int(length)


def _copy(response: HTTPResponse, file: BinaryIO, url: str, begin: int, total: int | None, progress: bool) -> None:
    with torch.hub.tqdm(  # torch.hub substitutes a simple bar if tqdm is not installed
        total=total,
        initial=begin,
        disable=not progress,
        desc=url.rpartition("/")[2],
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    ) as bar:
        while chunk := _read(response):
            file.write(chunk)
            bar.update(len(chunk))


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _BrokenDownload(str(error) or type(error).__name__) from error
