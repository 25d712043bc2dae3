"""Official weights: fetched once, verified at each use.

A file is looked for in the folder that ``BCOS_WEIGHTS`` names, for machines without a network, or else in torch.hub's
folder (``$TORCH_HOME/hub/checkpoints``), where it is downloaded to if it isn't there. It is used only if its SHA-256
begins with the digits in its name. A download is written beside its place under another name and gets its own when it
is whole and right; after an interruption it goes on where it stopped.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch.hub
from filelock import FileLock
from torch import Tensor

from bcos_train.model.weights import file_sha256, read_weights
from bcos_train.weights.records import ZooRecord, record

__all__ = ["MIRROR", "WeightsError", "load_official", "official_file"]

#: The variable that names a folder of official files.
MIRROR = "BCOS_WEIGHTS"
#: Seconds to wait before each further attempt at a download that broke off.
PAUSES = (1.0, 2.0, 4.0)
#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0
_CHUNK = 1 << 20
_ELSEWHERE = f"{MIRROR}=<folder> uses files that are there already"


class WeightsError(ValueError):
    """Official weights that can't be had: the message says why, and what to do."""


class _Broken(Exception):
    """A download that broke off; another attempt may succeed."""


def load_official(name: str, progress: bool = True) -> dict[str, Tensor]:
    """The official state dict of a row of the zoo.

    Raises:
        ValueError: There is no such row, or its file can't be had (:class:`WeightsError`).
    """
    return read_weights(official_file(record(name), progress))[0]


def official_file(row: ZooRecord, progress: bool = True) -> Path:
    """The verified file of a row on this machine, downloaded if need be; several processes at once download it once.

    Args:
        row: The row.
        progress: Show that of a download on stderr.

    Raises:
        WeightsError: The file isn't in the folder that ``BCOS_WEIGHTS`` names, isn't the published one, isn't on the
            server, or there is no way to the server or no room or right to write.
    """
    if mirror := os.environ.get(MIRROR):
        return _mirrored(Path(mirror).expanduser(), row)
    path = Path(torch.hub.get_dir()).expanduser() / "checkpoints" / row.file
    if _is_right(path, row):
        return path
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not _is_right(path, row):  # another process may have fetched it meanwhile
                _download(row, path, progress)
    return path


def _mirrored(folder: Path, row: ZooRecord) -> Path:
    path = folder / row.file
    if not folder.is_dir():
        raise WeightsError(f"{MIRROR}={folder}: no such folder; name one with {row.file}, or unset it to download that")
    if not path.is_file():
        raise WeightsError(f"{MIRROR}: no file {path}; put it there, or unset {MIRROR} to download {row.url}")
    if not _is_right(path, row):
        raise WeightsError(f"{MIRROR}: {path} isn't the published file: its SHA-256 doesn't begin with {row.sha256}")
    return path


def _is_right(path: Path, row: ZooRecord) -> bool:
    try:
        return file_sha256(path).startswith(row.sha256)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}; {_ELSEWHERE}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"can't write the weights to {folder}: {error.strerror or error}"
        raise WeightsError(f"{text}; TORCH_HOME=<folder> chooses another place, {_ELSEWHERE}") from error


def _download(row: ZooRecord, path: Path, progress: bool) -> None:
    """Fetch the file to ``path``, which no other process does at the same time."""
    part = path.with_name(f".{path.name}.part")
    for pause in (*PAUSES, None):
        try:
            is_whole = _fetch(row.url, part, progress)
            digest = file_sha256(part)
            if digest.startswith(row.sha256):
                os.replace(part, path)
                return
            part.unlink()
            if is_whole:
                raise WeightsError(
                    f"{row.url} isn't the published file: its SHA-256 begins with {digest[: len(row.sha256)]}, not "
                    f"{row.sha256}; try again later, or {_ELSEWHERE}"
                )
            problem = "its parts don't fit together"  # the first of them was of another file
        except _Broken as error:
            problem = str(error)
        if pause is not None:
            time.sleep(pause)
    raise WeightsError(
        f"downloading {row.url} broke off {len(PAUSES) + 1} times ({problem}); the same command goes on where it "
        f"stopped, and {_ELSEWHERE}"
    )


def _fetch(url: str, part: Path, progress: bool) -> bool:
    """Add to ``part`` what it lacks of the file at ``url``; whether all of it came now.

    Raises:
        _Broken: The connection was lost, or the server is in trouble.
        WeightsError: No such file, or no way to the server.
        OSError: ``part`` can't be written.
    """
    begin = part.stat().st_size if part.exists() else 0
    with closing(_open(url, begin)) as response:
        if response.status != 206:  # the whole file, although a part was asked for
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
                part.unlink()  # it would go on filling the disk
                raise
            if total is not None and file.tell() != total:
                raise _Broken(f"{file.tell():,} of {total:,} bytes came")
    return begin == 0


def _open(url: str, begin: int) -> HTTPResponse:
    """The server's answer to the request for the file from byte ``begin`` on."""
    request = Request(url, headers={"User-Agent": "bcos-train"} | ({"Range": f"bytes={begin}-"} if begin else {}))
    try:
        return urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and begin:  # nothing is left to send: the part is whole already, or of another file
            return _open(url, 0)
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"HTTP {error.code} {error.reason}") from error
        raise WeightsError(f"{url}: the server says {error.code} {error.reason}; {_ELSEWHERE}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (ConnectionResetError, TimeoutError, HTTPException)):
            raise _Broken(str(reason)) from error
        raise WeightsError(f"no connection for {url}: {reason}; without a network, {_ELSEWHERE}") from error


def _length(response: HTTPResponse, begin: int) -> int | None:
    """Length of the whole file, if the server says it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != begin:
            raise _Broken(f"the server sent another part of the file than that from byte {begin} on")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return None if length is None else int(length)


def _copy(response: HTTPResponse, file: BinaryIO, url: str, begin: int, total: int | None, progress: bool) -> None:
    # torch.hub's own display: tqdm where it is installed.
    tqdm: Any = torch.hub.tqdm
    size: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=total, initial=begin, disable=not progress, desc=url.rpartition("/")[2], **size) as bar:
        while chunk := _read(response):
            file.write(chunk)
            bar.update(len(chunk))


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error
