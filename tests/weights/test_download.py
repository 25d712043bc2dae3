"""Downloading official weights: from a faulty server, from a mirror, and by several processes."""

import errno
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train import create_model
from bcos_train.weights import WeightsError, ZooRecord, download, download_official
from bcos_train.weights.files import read_weights

from .release import Fault, Release, as_file, publish, state_of

#: Large enough for several reads.
CONTENT = bytes(range(256)) * 12_000


@pytest.fixture
def row(release: Release, monkeypatch: pytest.MonkeyPatch) -> ZooRecord:
    """A row whose file is on the fake release."""
    row = publish(monkeypatch, "resnet18", CONTENT)
    release.files[row.file] = CONTENT
    monkeypatch.setattr(download, "_CHUNK", 100_000)
    return row


def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub" / "checkpoints"


def files(tmp_path: Path) -> dict[str, bytes]:
    """What lies in the cache, besides the locks."""
    folder = checkpoints(tmp_path)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def refused(row: ZooRecord) -> str:
    with pytest.raises(WeightsError) as caught:
        download_official(row, progress=False)
    message = str(caught.value)
    assert "\n" not in message
    assert "BCOS_WEIGHTS" in message
    return message


# ---- the cache


def test_second_use_needs_no_network(release: Release, row: ZooRecord, tmp_path: Path) -> None:
    path = download_official(row)
    assert path == checkpoints(tmp_path) / row.file
    release.faults[:] = [500] * 9
    assert download_official(row) == path
    assert files(tmp_path) == {row.file: CONTENT}
    assert release.requests == [(f"/{row.file}", 0)]


def deny(monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(download, "FileLock", lock)


def test_cache_need_not_be_writable(row: ZooRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download_official(row)
    deny(monkeypatch)
    assert download_official(row) == path


def test_permission_denied(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch)
    assert f"can't write the weights to {checkpoints(tmp_path)}: Permission denied; TORCH_HOME=<folder>" in refused(row)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_damaged_cache_is_fetched_again(damage: str, release: Release, row: ZooRecord, tmp_path: Path) -> None:
    path = download_official(row)
    raw = bytearray(CONTENT)
    raw[1000] ^= 1
    path.write_bytes({"bit": raw, "cut": CONTENT[:-1], "empty": b""}[damage])
    assert download_official(row).read_bytes() == CONTENT
    assert len(release.requests) == 2
    assert files(tmp_path).keys() == {row.file}


def test_hub_folder_can_be_set(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "elsewhere"))
    assert download_official(row) == tmp_path / "elsewhere" / "checkpoints" / row.file


def test_progress(row: ZooRecord, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    download_official(row, progress=False).unlink()
    assert capfd.readouterr() == ("", "")
    download_official(row)
    out, err = capfd.readouterr()
    assert out == ""
    assert row.file in err
    assert "100%" in err


def test_progress_without_tqdm(row: ZooRecord, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.hub, "tqdm", torch.hub._Faketqdm)
    download_official(row)
    assert "100.0%" in capfd.readouterr().err


# ---- broken downloads

HALF = len(CONTENT) // 2


@pytest.mark.parametrize(
    ("faults", "begins"),
    [
        pytest.param([503], [0, 0], id="server error"),
        pytest.param([429, 500, 502], [0, 0, 0, 0], id="three errors"),
        pytest.param(["reset"], [0, 0], id="reset before the answer"),
        pytest.param(["cut"], [0, HALF], id="cut"),
        pytest.param(["reset within"], None, id="reset within"),
        pytest.param(["stall"], None, id="no more bytes"),
        pytest.param(["cut", "cut", "cut"], [0, HALF, HALF * 3 // 2, HALF * 7 // 4], id="cut three times"),
        pytest.param(["cut", "no ranges"], [0, HALF], id="server sends the whole file again"),
        pytest.param(["cut", "another part"], [0, HALF, HALF], id="server sends another part"),
        pytest.param(["no length"], [0], id="length unknown"),
    ],
)
def test_resumes_after(
    faults: list[Fault],
    begins: list[int] | None,
    release: Release,
    row: ZooRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    release.faults = list(faults)
    assert download_official(row, progress=False).read_bytes() == CONTENT
    assert files(tmp_path) == {row.file: CONTENT}
    if begins is None:  # how much has been read when a connection breaks isn't exactly known
        assert len(release.requests) == 2
        assert release.requests[1][1] > 0
    else:
        assert [begin for _, begin in release.requests] == begins


def test_cut_without_a_known_length(release: Release, row: ZooRecord) -> None:
    """Only the hash can tell; what came is then no beginning of the file."""
    release.files[row.file] = CONTENT[:HALF]
    release.faults = ["no length"]
    assert "is not the published file" in refused(row)


@pytest.mark.parametrize("faults", [[503] * 4, ["cut"] * 4, ["reset"] * 4], ids=["503", "cut", "reset"])
def test_gives_up_after_three_more_attempts(faults: list[Fault], release: Release, row: ZooRecord) -> None:
    release.faults = [*faults]
    message = refused(row)
    assert len(release.requests) == 4
    assert f"downloading {row.url} broke off 4 times" in message
    assert download_official(row, progress=False).read_bytes() == CONTENT
    assert release.requests[-1][1] == (len(CONTENT) - HALF // 8 if faults[0] == "cut" else 0)


def test_part_of_another_file_is_discarded(release: Release, row: ZooRecord, tmp_path: Path) -> None:
    part = checkpoints(tmp_path) / f".{row.file}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    assert download_official(row, progress=False).read_bytes() == CONTENT
    assert [begin for _, begin in release.requests] == [1000, 0]


@pytest.mark.parametrize("extra", [0, 10], ids=["whole", "longer"])
def test_part_with_nothing_left_to_send(extra: int, release: Release, row: ZooRecord, tmp_path: Path) -> None:
    part = checkpoints(tmp_path) / f".{row.file}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"x" * extra)
    assert download_official(row, progress=False).read_bytes() == CONTENT
    assert files(tmp_path) == {row.file: CONTENT}


# ---- what can't be put right here


def test_wrong_file_on_the_server(release: Release, row: ZooRecord, tmp_path: Path) -> None:
    release.files[row.file] = CONTENT[::-1]
    assert f"{row.url} is not the published file: its SHA-256 begins with " in refused(row)
    assert len(release.requests) == 1
    assert files(tmp_path) == {}


@pytest.mark.parametrize(("status", "text"), [(404, "404 Not Found"), (403, "403 Forbidden")])
def test_no_such_file(status: int, text: str, release: Release, row: ZooRecord, tmp_path: Path) -> None:
    release.faults = [status]
    assert f"{row.url}: the server answered {text}" in refused(row)
    assert len(release.requests) == 1
    assert files(tmp_path) == {}


def test_connection_refused(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr("bcos_train.weights.records.RELEASE", f"http://127.0.0.1:{port}")
    assert "no connection for http://127.0.0.1" in (message := refused(row))
    assert "refused" in message
    assert files(tmp_path) == {}


def test_unknown_host(row: ZooRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert "no connection for http://127.0.0.1" in refused(row)


def test_path_that_is_no_folder(row: ZooRecord, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    message = refused(row)
    assert f"can't write the weights to {checkpoints(tmp_path)}: Not a directory; TORCH_HOME=<folder>" in message


def test_full_disk(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert f"can't write the weights to {checkpoints(tmp_path)}: No space left on device" in refused(row)
    assert files(tmp_path) == {}


# ---- a mirror


@pytest.fixture
def mirror(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("BCOS_WEIGHTS", str(folder))
    return folder


def test_mirror(mirror: Path, release: Release, row: ZooRecord, tmp_path: Path) -> None:
    (mirror / row.file).write_bytes(CONTENT)
    assert download_official(row) == mirror / row.file
    assert release.requests == []
    assert not (tmp_path / "home").exists()
    assert [path.name for path in mirror.iterdir()] == [row.file]


def test_mirror_without_the_file(mirror: Path, release: Release, row: ZooRecord) -> None:
    assert refused(row).startswith(f"BCOS_WEIGHTS: no file {mirror / row.file}; put it there, or unset BCOS_WEIGHTS")
    assert release.requests == []


def test_missing_mirror(mirror: Path, row: ZooRecord) -> None:
    mirror.rmdir()
    assert refused(row).startswith(f"BCOS_WEIGHTS={mirror}: no such folder; name one with {row.file}, or unset it")


def test_mirror_with_another_file(mirror: Path, release: Release, row: ZooRecord) -> None:
    (mirror / row.file).write_bytes(CONTENT[:-1])
    assert f"{mirror / row.file} is not the published file: its SHA-256 doesn't begin with {row.sha256}" in refused(row)
    assert release.requests == []
    assert (mirror / row.file).exists()


def test_empty_mirror_is_ignored(row: ZooRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCOS_WEIGHTS", "")
    assert download_official(row, progress=False) == checkpoints(tmp_path) / row.file


# ---- several processes


def test_several_processes_fetch_once(release: Release, row: ZooRecord, tmp_path: Path) -> None:
    release.faults = ["stall"]  # the first is busy while the others arrive
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=download_official, args=(row, False)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(release.requests) == 2
    assert files(tmp_path) == {row.file: CONTENT}


# ---- into models


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_official_weights_are_those_of_the_file(
    legacy: bool, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of("resnet18")
    content = as_file(state, _use_new_zipfile_serialization=not legacy)
    row = publish(monkeypatch, "resnet18", content)
    release.files[row.file] = content
    (tmp_path / "w.pth").write_bytes(content)
    by_hand = create_model("resnet18")
    by_hand.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    for options in ({"pretrained": True}, {"weights": "official"}, {"weights": "official", "pretrained": True}):
        loaded = create_model("resnet18", progress=False, **options).state_dict()
        assert loaded.keys() == state.keys()
        for key, value in by_hand.state_dict().items():
            assert torch.equal(loaded[key], value), key
    assert len(release.requests) == 1


def test_changing_the_model_leaves_the_file_unchanged(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = as_file(state_of("resnet18"))
    row = publish(monkeypatch, "resnet18", content)
    release.files[row.file] = content
    model = create_model("resnet18", pretrained=True, progress=False)
    path = download_official(row)
    for tensor in (*model.parameters(), *read_weights(path)[0].values()):
        tensor.data.zero_()
    assert path.read_bytes() == content


def test_code_in_an_official_file_is_not_run(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    content = as_file({"weight": Trap()})  # type: ignore[dict-item]
    row = publish(monkeypatch, "resnet18", content)
    release.files[row.file] = content
    with pytest.raises(ValueError, match="holds a Python object"):
        create_model("resnet18", pretrained=True, progress=False)
    assert not (tmp_path / "trapped").exists()
