"""Compose the project's own configs."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bcos_train.config.composition import Composer

CONFIGS = Path(__file__).parents[2] / "configs"
COMPOSER = Composer(CONFIGS)


@cache
def _compose(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_ROOT", "/data")
        patch.setenv("IMAGENET_PATH", "/imagenet")
        return COMPOSER.compose(name, overrides)


def compose(*overrides: str, name: str = "train") -> dict[str, Any]:
    """The config for a command line; the same one for the same overrides: not to be changed."""
    return _compose(name, overrides)
