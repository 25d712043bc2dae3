"""Command lines of the scripts: user errors are one line and exit code 2."""

import argparse
import re
from typing import NoReturn

from bcos_train.utils.suggestions import suggest

__all__ = ["INTERRUPTED", "MISTAKE", "Parser"]

#: Exit codes: user error, and interrupt as shells report it (128 + SIGINT).
MISTAKE, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """Argument parser that raises a one-line ValueError with suggestions, instead of printing usage and exiting."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        prefix, _, rest = message.partition("unrecognized arguments: ")
        if not prefix and rest:
            known = [name for action in self._actions for name in action.option_strings]
            message = f"{rest}: no such option{suggest(rest.split()[0].partition('=')[0], known)}"
        message = re.sub(r"^argument (\S+): ignored explicit argument (.*)$", r"\1 takes no value, got \2", message)
        raise ValueError(message)
