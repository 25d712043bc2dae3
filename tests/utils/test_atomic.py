"""Files that appear complete or not at all."""

from pathlib import Path

import pytest

from bcos_train.utils.atomic import replacing


@pytest.mark.parametrize("before", [None, "old"])
def test_the_file_appears_at_the_end(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == (before is not None)
        assert before is None or path.read_text() == before
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_exception_all_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stopped() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
