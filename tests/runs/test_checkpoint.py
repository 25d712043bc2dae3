"""Checkpoint files: round trips, verification, and crashes at any step."""

import errno
import hashlib
import os
import pickle
import re
import resource
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.runs import assert_same_state

from bcos_train.runs import checkpoint as files
from bcos_train.runs.checkpoint import LAST, PREVIOUS, DamagedCheckpoint

NESTED = {
    "model": OrderedDict(weight=torch.randn(3, 4), bias=torch.zeros(3, dtype=torch.float64), empty=torch.zeros(0)),
    "counts": {0: 1, 1: -2},
    "list": [1, 2.5, "text", None, True, [torch.arange(3), (1, 2)]],
    "half": torch.tensor(1.5, dtype=torch.bfloat16),
    "infinite": float("inf"),
}


def content(n: int) -> dict[str, Any]:
    return {"n": n, "tensor": torch.full((100,), float(n))}


def valid(folder: Path) -> dict[str, int]:
    """Return ``n`` of each valid checkpoint by name, after checking its tensor."""
    found = {}
    for path in folder.glob("*.ckpt"):
        try:
            loaded = files.load(path)
        except DamagedCheckpoint:
            continue
        assert_same_state(loaded, content(loaded["n"]))
        found[path.name] = loaded["n"]
    return found


def in_child(task: Callable[[], None]) -> int:
    """Run ``task`` in a child process and return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            task()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / LAST
    files.save(NESTED, path)
    assert_same_state(files.load(path), NESTED)


Point = namedtuple("Point", "x y")


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        pytest.param({"a": {"b": [1, {2}]}}, "checkpoint.a.b[1]", "set", id="nested"),
        pytest.param({"a": Path("x")}, "checkpoint.a", "Path", id="path"),
        pytest.param({"a": np.float64(1)}, "checkpoint.a", "float64", id="numpy's float is a float"),
        pytest.param({"a": np.zeros(3)}, "checkpoint.a", "ndarray", id="array"),
        pytest.param({"a": Point(1, 2)}, "checkpoint.a", "Point", id="named tuple is a tuple"),
        pytest.param({"a": torch.zeros(3).as_subclass(Tagged)}, "checkpoint.a", "Tagged", id="tensor subclass"),
        pytest.param({"a": print}, "checkpoint.a", "builtin_function", id="function"),
        pytest.param({"a": {(1, 2): 3}}, "checkpoint.a", r"key \(1, 2\)", id="key"),
    ],
)
def test_objects_are_refused(value: dict[str, Any], place: str, kind: str, tmp_path: Path) -> None:
    files.save(content(1), tmp_path / LAST)
    with pytest.raises(TypeError, match=f"^{re.escape(place)} .*{kind}"):
        files.save(value, tmp_path / LAST)
    assert valid(tmp_path) == {LAST: 1}


def test_digest_file(tmp_path: Path) -> None:
    files.save(content(1), tmp_path / LAST)
    files.save(content(2), tmp_path / LAST)
    for name in (LAST, PREVIOUS):
        # What `sha256sum -c` reads: 64 digits, two spaces, the name, a newline.
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert (tmp_path / f"{name}.sha256").read_text() == f"{digest}  {name}\n"


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


DAMAGES = {
    "bit": (flip_bit, "is damaged"),
    "cut": (truncate, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "no digest": (lambda path: digest_of(path).unlink(), "has no last.ckpt.sha256 beside it"),
    "empty digest": (lambda path: digest_of(path).write_text(""), "has an empty last.ckpt.sha256 beside it"),
    "digest of bytes": (lambda path: digest_of(path).write_bytes(b"\xff\xfe\n"), "is damaged"),
}
damages = pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())


@damages
def test_damage_is_noticed(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / LAST
    files.save(content(1), path)
    damage(path)
    with pytest.raises(DamagedCheckpoint, match=message):
        files.load(path)


def test_a_digest_file_with_more_than_the_digest(tmp_path: Path) -> None:
    """Only its first word counts, also where the rest is no text."""
    path = tmp_path / LAST
    files.save(content(1), path)
    digest_of(path).write_bytes(digest_of(path).read_bytes() + b"\xff\0")
    files.copy(path, tmp_path / "epoch-0001-x.ckpt")
    files.save(content(2), path)
    assert valid(tmp_path) == {LAST: 2, PREVIOUS: 1, "epoch-0001-x.ckpt": 1}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=LAST):
        files.load(tmp_path / LAST)


def test_unreadable_disk_counts_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.save(content(1), tmp_path / LAST)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "file_sha256", broken)
    path, complaints = files.newest_valid(tmp_path)
    assert path is None
    assert complaints == [f"{tmp_path / LAST} can't be read: Input/output error"]


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    for name, write in {
        "plain.ckpt": lambda p: p.write_bytes(pickle.dumps({"model": Trap()}, protocol=2)),
        "torch.ckpt": lambda p: torch.save({"model": Trap()}, p),
    }.items():
        path = tmp_path / name
        write(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        digest_of(path).write_text(f"{digest}  {name}\n")
        with pytest.raises(DamagedCheckpoint, match="can't be read"):
            files.load(path)
    assert not (tmp_path / "trapped").exists()


# ---- the newest valid one


@damages
def test_damaged_last_is_skipped(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    for n in (1, 2):
        files.save(content(n), tmp_path / LAST)
    damage(tmp_path / LAST)
    path, complaints = files.newest_valid(tmp_path)
    assert path == tmp_path / PREVIOUS
    assert len(complaints) == 1
    assert message in complaints[0]


def test_last_is_newest_regardless_of_its_time(tmp_path: Path) -> None:
    for n in (1, 2):
        files.save(content(n), tmp_path / LAST)
    files.copy(tmp_path / PREVIOUS, tmp_path / "epoch-0001-x.ckpt")
    # As after `cp -r`, in an unlucky order.
    for time, name in enumerate((LAST, PREVIOUS, "epoch-0001-x.ckpt")):
        os.utime(tmp_path / name, (time, time))
    assert files.newest_valid(tmp_path) == (tmp_path / LAST, [])


def test_best_ones_are_a_last_resort(tmp_path: Path) -> None:
    files.save(content(1), tmp_path / "epoch-0001-x.ckpt")
    for n in (2, 3):
        files.save(content(n), tmp_path / LAST)
    for name in (LAST, PREVIOUS):
        flip_bit(tmp_path / name)
    path, complaints = files.newest_valid(tmp_path)
    assert path == tmp_path / "epoch-0001-x.ckpt"
    assert len(complaints) == 2


def test_other_files_are_ignored(tmp_path: Path) -> None:
    assert files.newest_valid(tmp_path / "missing") == (None, [])
    (tmp_path / f".{LAST}.123.tmp").write_bytes(b"half")
    (tmp_path / "best.json").write_text("[]")
    assert files.newest_valid(tmp_path) == (None, [])
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "lost.ckpt").symlink_to(tmp_path / "nowhere")
    path, complaints = files.newest_valid(tmp_path)
    assert path is None
    assert len(complaints) == 2


# ---- crashes


class Fault(RuntimeError):
    pass


SAVE_STEPS = ("replace", "fsync", "link")


def fail_at(monkeypatch: pytest.MonkeyPatch, n: int, fail: Callable[[], None]) -> list[str]:
    """Make the n-th call of a function that touches the disk fail; returns the list of calls so far."""
    calls: list[str] = []

    def wrap(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == n + 1:
                fail()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    for name in SAVE_STEPS:
        wrap(os, name)
    wrap(torch, "save")
    return calls


def number_of_steps(action: Callable[[], None]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, -1, lambda: None)
        action()
        return len(calls)


def test_steps_are_counted(tmp_path: Path) -> None:
    """The crash tests below go through every call that touches the disk: there must be some."""
    files.save(content(1), tmp_path / LAST)
    # Three files (the checkpoint, its digest, that of the previous one) are flushed, four renamed, the folder flushed.
    assert number_of_steps(lambda: files.save(content(2), tmp_path / LAST)) == 1 + 3 + 4 + 1


@pytest.mark.parametrize("damaged", [False, True], ids=["sound last", "damaged last"])
@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("step", range(9))
def test_crash_at_any_step_of_saving(
    step: int, how: str, damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (1, 2):
        files.save(content(n), tmp_path / LAST)
    if damaged:
        flip_bit(tmp_path / LAST)

    def fault() -> None:
        raise Fault

    def crash() -> None:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, fault if how == "raise" else lambda: os._exit(9))
            files.save(content(3), tmp_path / LAST)

    if how == "kill":
        assert in_child(crash) == (99 if damaged and step > 7 else 9)
    elif damaged and step > 7:  # the damaged one is set aside: one step less
        crash()
    else:
        with pytest.raises(Fault):
            crash()
    left = valid(tmp_path)
    assert left
    assert set(left.values()) <= {1, 2, 3}
    newest, _ = files.newest_valid(tmp_path)
    assert newest is not None
    assert left[newest.name] == max(left.values()) >= (1 if damaged else 2)
    if how == "raise":
        assert not list(tmp_path.glob(".*"))
    files.save(content(4), tmp_path / LAST)
    assert valid(tmp_path)[LAST] == 4
    assert not list(tmp_path.glob(f".{LAST}*")), "left over from the killed process"


@pytest.mark.parametrize("step", range(4))
def test_crash_at_any_step_of_the_first_save(step: int, tmp_path: Path) -> None:
    def crash() -> None:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, lambda: os._exit(9))
            files.save(content(1), tmp_path / LAST)

    assert in_child(crash) == 9
    assert valid(tmp_path) == {}
    assert files.newest_valid(tmp_path)[0] is None
    files.save(content(2), tmp_path / LAST)
    assert valid(tmp_path) == {LAST: 2}


@pytest.mark.parametrize("step", range(4))
def test_crash_while_copying(step: int, tmp_path: Path) -> None:
    files.save(content(1), tmp_path / LAST)

    def crash() -> None:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, lambda: os._exit(9))
            files.copy(tmp_path / LAST, tmp_path / "best.ckpt")

    assert in_child(crash) == 9
    assert valid(tmp_path) == {LAST: 1}


@pytest.mark.parametrize("room", [0, 300, 2000, 20_000], ids=lambda n: f"{n} bytes")
def test_full_disk(room: int, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk's: writing fails in the same calls."""
    for n in (1, 2):
        files.save(content(n), tmp_path / LAST)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            files.save({"n": 3, "tensor": torch.randn(100_000)}, tmp_path / LAST)
        except OSError as error:
            os._exit(error.errno or 1)

    assert in_child(save) == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_full_disk_while_writing_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1, 2):
        files.save(content(n), tmp_path / LAST)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_stage_digest", full)
    with pytest.raises(OSError, match="No space left"):
        files.save(content(3), tmp_path / LAST)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- copies


@pytest.mark.parametrize("links", [True, False], ids=["link", "no links"])
def test_copy_outlives_its_source(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    best = tmp_path / "epoch-0001.ckpt"
    files.save(content(1), tmp_path / LAST)
    files.copy(tmp_path / LAST, best)
    assert best.samefile(tmp_path / LAST) == links
    assert digest_of(best).read_text().endswith(f"  {best.name}\n")
    for n in (2, 3):
        files.save(content(n), tmp_path / LAST)
    assert valid(tmp_path) == {LAST: 3, PREVIOUS: 2, best.name: 1}
    files.delete(tmp_path / LAST)
    files.delete(tmp_path / LAST)
    assert valid(tmp_path) == {PREVIOUS: 2, best.name: 1}


def test_copy_twice(tmp_path: Path) -> None:
    """Renaming one name of a file to another name of it does nothing, and would leave the temporary name."""
    files.save(content(1), tmp_path / LAST)
    for _ in range(2):
        files.copy(tmp_path / LAST, tmp_path / "best.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.ckpt", "best.ckpt.sha256", LAST, f"{LAST}.sha256",
    ]  # fmt: skip
