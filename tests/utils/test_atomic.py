from pathlib import Path

import pytest

from bcos_train.utils.atomic import atomic_write


@pytest.mark.parametrize("before", [None, "old"])
def test_replaced_at_the_end_of_the_block(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == (before is not None)
        assert before is None or path.read_text() == before
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_unchanged_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
