"""A rich console for text that others chose."""

from typing import Any

from rich.console import Console
from rich.text import Text

from bcos_train.utils.terminal import printable

__all__ = ["make_console"]


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that shows text literally, also in tables: no markup, no highlights, no escape sequences."""
    return _Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)
