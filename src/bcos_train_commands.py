"""Entry points of the installed commands. They are outside the package, which takes seconds to import."""

import os
import signal

__all__ = ["evaluate", "train"]


def train() -> None:
    """Run ``bcos-train``."""
    _run("train")


def evaluate() -> None:
    """Run ``bcos-evaluate``."""
    _run("evaluate")


def _run(name: str) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until the command handles Ctrl-C itself
    from bcos_train import commands

    signal.signal(signal.SIGINT, signal.default_int_handler)
    getattr(commands, name)()
