"""Print on the terminal text that others chose: class names, run names, file names."""

import sys
import unicodedata
from typing import TextIO

__all__ = ["is_printable", "print_line", "printable"]

#: Unicode categories that a terminal acts on instead of showing them: control characters, which begin escape sequences,
#: characters that change the direction of the text or are invisible, and halves of surrogate pairs, as Python
#: represents the bytes of a file name that is not UTF-8.
ACTED_ON = ("Cc", "Cf", "Cs")


def is_printable(text: str) -> bool:
    """True if a terminal shows the text as one line, and does nothing else."""
    return not any(unicodedata.category(character) in ACTED_ON for character in text)


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return the text with escapes such as ``\x1b`` for the characters that a terminal acts on, except ``keep``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) in ACTED_ON and character not in keep else character
        for character in text
    )


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print on stderr, or on ``file``."""
    print(printable(str(text)), file=sys.stderr if file is None else file)
