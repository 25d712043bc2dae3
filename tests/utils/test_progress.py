"""Progress of long work where the output is no terminal."""

import pytest

from bcos_train.utils import progress
from bcos_train.utils.progress import show_progress


def test_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with show_progress("writing") as report:
        report(0, 4)
        report(2, 4, "a.tar")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "writing: 0 of 4\nwriting: 2 of 4" in printed.err


def test_at_most_one_line_per_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("writing") as report:
        for done in range(5):
            report(done, 4)
    assert "writing:" not in capsys.readouterr().err
