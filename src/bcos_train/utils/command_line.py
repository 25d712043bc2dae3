"""What the command lines of the scripts share: a user's mistake is one line and exit code 2."""

import argparse
import re
from typing import NoReturn

from bcos_train.utils.suggestions import suggest

__all__ = ["INTERRUPTED", "MISTAKE", "Parser"]

#: Exit codes: a mistake of the user's, and an interrupt as shells report it (128 + SIGINT).
MISTAKE, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """Raises a ValueError with one line that has the nearest right name, where argparse prints its usage and exits."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition("unrecognized arguments: ")
        if not kind and rest:
            known = [name for action in self._actions for name in action.option_strings]
            message = f"{rest}: no such option{suggest(rest.split()[0].partition('=')[0], known)}"
        message = re.sub(
            r"^argument (\S+): ignored explicit argument (.*)$", r"\1 takes no value, \2 was given", message
        )
        raise ValueError(message)
