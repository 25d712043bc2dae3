"""Git LFS pointers, web pages and empty files are recognized, and nothing else is."""

from pathlib import Path

import pytest

from bcos_train.runs import checkpoint
from bcos_train.utils.substitutes import substitute_reason

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
        ("\n<HTML>", "is a web page (HTML), not the file itself: download it again"),
        ("", "is empty"),
        ("version 1", None),
    ],
)
def test_reason(content: str, reason: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    assert substitute_reason(tmp_path / "file") == reason


def test_checkpoint_of_a_run(tmp_path: Path) -> None:
    checkpoint.save({"n": 1}, path := tmp_path / "last.ckpt")
    path.write_text(POINTER)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"last\.ckpt is a Git LFS pointer, not the file itself"):
        checkpoint.load(path)
