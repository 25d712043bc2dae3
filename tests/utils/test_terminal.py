"""Text that others chose reaches the terminal without escape sequences, markup or hidden characters."""

import pytest
from rich.table import Table

from bcos_train.utils.console import make_console
from bcos_train.utils.terminal import is_printable, print_line, printable

ESCAPE = "\x1b[2J\x1b]0;title\x07"
HOSTILE = [ESCAPE, "a\rb", "\x9b31m", "abc\u202edef", "a\u200bb", "caf\udce9", "\x00", "\x7f"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_acts_on_is_escaped(text: str) -> None:
    shown = printable(text)
    assert is_printable(shown)
    assert not is_printable(text)
    shown.encode()  # no halves of surrogate pairs
    assert "\\" in shown


@pytest.mark.parametrize("text", ["", "résumé", "日本語", "a b·c", "[/b]", "😀"])
def test_other_text_is_unchanged(text: str) -> None:
    assert printable(text) == text
    assert is_printable(text)


def test_line_breaks_are_kept_unless_one_line_is_asked_for() -> None:
    assert printable("a\n\tb\x1b") == "a\n\tb\\x1b"
    assert printable("a\nb", keep="") == "a\\nb"


def test_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=f"[/b]{ESCAPE}")
    table.add_column("[red]column")
    table.add_row(f"[/i]:smile:{ESCAPE}")
    console = make_console()
    console.print(table)
    console.print(f"[/b] {ESCAPE}", style="red", soft_wrap=True)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\\x1b") == 6
    assert all(text in out for text in ("[/b]", "[red]column", "[/i]:smile:"))


def test_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(ValueError(f"{ESCAPE}[/b]"))
    assert capsys.readouterr().err == "\\x1b[2J\\x1b]0;title\\x07[/b]\n"
