"""The index of a tar file, and what is refused in one."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from bcos_train.dataset.storage.tar_index import MAX_CLASS, BadShard, index_tar

Add = Callable[..., None]


def write(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info


SAMPLE = (("a.jpg", b"JPEG"), ("a.cls", b"3"))


def test_offsets_lengths_and_labels(tmp_path: Path) -> None:
    members = (
        *(("dir/a.cls", b" 3\n"), ("dir/a.jpg", b"first")),
        *(("b.x.jpg", b"no image: the extension is x.jpg"), ("b.PNG", b"second"), ("b.json", b'{"class": "cat"}')),
        *(("c.jpeg", b"third"), ("c.txt", b"a caption")),
        *(("d.cls", b"dog"),),
        *(("e.webp", b"fifth"), ("e.json", b'{"label": 7, "class": "cat"}')),
    )
    path = write(tmp_path / "a.tar", *members)
    content = path.read_bytes()
    found = [
        (sample.key, content[sample.offset : sample.offset + sample.length], sample.label) for sample in index_tar(path)
    ]
    assert found == [
        ("dir/a", b"first", 3),
        ("b", b"second", "cat"),
        ("c", b"third", None),
        ("d", b"", "dog"),
        ("e", b"fifth", 7),
    ]


@pytest.mark.parametrize("label", [b"\xff", b'["a"]', b"", b"[" * 2000], ids=["bytes", "list", "empty", "deep"])
def test_unusable_labels_are_none(label: bytes, tmp_path: Path) -> None:
    kind = "cls" if label in (b"\xff", b"") else "json"
    (sample,) = index_tar(write(tmp_path / "a.tar", ("a.jpg", b"x"), (f"a.{kind}", label)))
    assert sample.label is None


def test_shards_of_webdataset(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n:06d}", "jpeg": bytes([n]) * 600, "cls": str(n), "txt": "text"})
    content = (tmp_path / "a.tar").read_bytes()
    samples = index_tar(tmp_path / "a.tar")
    assert [content[sample.offset :][: sample.length] for sample in samples] == [bytes([n]) * 600 for n in range(3)]
    assert [sample.label for sample in samples] == [0, 1, 2]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    members = (special("folder", tarfile.DIRTYPE), ("._a.jpg", b"macOS"), (".git/a.jpg", b"x"), *SAMPLE)
    assert [sample.key for sample in index_tar(write(tmp_path / "a.tar", *members))] == ["a"]


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (("/etc/a.jpg", b"x"), "'/etc/a.jpg' is not a relative path"),
        (("a/../../b.jpg", b"x"), "'a/../../b.jpg' is not a relative path"),
        (("a\\b.jpg", b"x"), "is not a relative path"),
        (("a\n.jpg", b"x"), r"'a\\n.jpg' is not a relative path"),
        (special("b.jpg", tarfile.SYMTYPE), "'b.jpg' is a link"),
        (special("b.jpg", tarfile.LNKTYPE), "'b.jpg' is a link"),
        (special("b.jpg", tarfile.CHRTYPE), "'b.jpg' is a special file"),
        (special("b.jpg", tarfile.FIFOTYPE), "'b.jpg' is a special file"),
        (("b.cls", bytes(MAX_CLASS + 1)), "'b.cls' has 1,025 bytes, at most 1,024"),
        (("a.jpeg", b"x"), "'a' has two files 'a.jpg' and 'a.jpeg'"),
        (("a.cls", b"x"), "'a' has two files 'a.cls' and 'a.cls'"),
    ],
)
def test_refused_members(member: tuple[str, bytes] | tarfile.TarInfo, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "shard.tar", *SAMPLE, member)
    with pytest.raises(BadShard, match=problem) as caught:
        index_tar(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_interleaved_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1"))
    with pytest.raises(BadShard, match="the files of the sample 'a' are not consecutive"):
        index_tar(path)


def test_sparse_files(tmp_path: Path) -> None:
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": "9999999999"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(BadShard, match="sparse"):
        index_tar(tmp_path / "a.tar")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    members = [(f"{n}.{extension}", b"0") for n in range(4) for extension in ("jpg", "cls")]
    content = write(tmp_path / "a.tar", *members).read_bytes()
    end = len(members) * 1024  # followed by the end of the archive, two blocks of zeros or more
    assert len(index_tar(tmp_path / "a.tar")) == 4
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1024, 256), end - 1, end + 1023]:
        cut.write_bytes(content[:length])
        with pytest.raises(BadShard, match=r"cut|damaged|not a tar file"):
            index_tar(cut)
    cut.write_bytes(content[: end + 1024])
    assert len(index_tar(cut)) == 4


def test_damaged_headers(tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "a.tar", *SAMPLE, ("b.jpg", b"x"), ("b.cls", b"1")).read_bytes())
    for block in (0, 2, 4):
        damaged = bytearray(content)
        damaged[block * 512 + 100] ^= 0xFF
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(BadShard):
            index_tar(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "not a tar file"), (b"<html>" * 200, "not a tar file"), (b"\x1f\x8b\x08" + bytes(600), "compressed")],
    ids=["empty", "html", "gzip"],
)
def test_other_files(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BadShard, match=problem):
        index_tar(tmp_path / "a.tar")


def test_missing_files_and_shards_without_images(tmp_path: Path) -> None:
    with pytest.raises(BadShard, match="No such file"):
        index_tar(tmp_path / "none.tar")
    with pytest.raises(BadShard, match="no images"):
        index_tar(write(tmp_path / "a.tar", ("a.txt", b"x")))
