import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import toys

import bcos_train
from bcos_train.config import TARGETS, UserError
from bcos_train.config.signature import keyword_parameters
from bcos_train.config.targets import resolve

OURS = [name for name in TARGETS if name.startswith("bcos_train.")]


def accepts_any_keyword(target: Callable[..., object]) -> bool:
    """True if ``target`` would swallow a misspelled keyword: ``**kwargs`` without a ``config_signature``.

    False for a class that inherits the ``__init__`` of another package.
    """
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    function = target.__init__ if inspect.isclass(target) else target
    same_package = function.__module__.partition(".")[0] == target.__module__.partition(".")[0]
    return inspect.Parameter.VAR_KEYWORD in kinds and same_package and not hasattr(target, "config_signature")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_can_be_imported_and_called(name: str) -> None:
    pytest.importorskip(name.partition(".")[0])
    assert callable(resolve(name))


@pytest.mark.parametrize("name", OURS)
def test_our_signatures_are_the_schema(name: str) -> None:
    target = resolve(name)
    assert not accepts_any_keyword(target), (
        "**kwargs swallow misspelled keys: name the parameters or add config_signature"
    )
    get_type_hints(target.__init__ if inspect.isclass(target) else target)
    untyped = [key for key, parameter in keyword_parameters(target, {}).items() if parameter.annotation is Any]
    assert untyped == []


def test_names_are_exact_and_without_repetition() -> None:
    assert len(set(TARGETS)) == len(TARGETS)
    assert all(part.isidentifier() for name in TARGETS for part in name.split("."))


def test_accepts_any_keyword() -> None:
    assert accepts_any_keyword(toys.Open)
    assert not accepts_any_keyword(toys.create_net)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcos_train.config.targets.TARGETS", ("nopackage.sub.Logger", "bcos_train.nomodule.Logger"))
    with pytest.raises(UserError, match=r"^log\._target_=nopackage\.sub\.Logger: nopackage is not installed$"):
        resolve("nopackage.sub.Logger", "log")
    # A missing module of this package is a bug.
    with pytest.raises(ModuleNotFoundError):
        resolve("bcos_train.nomodule.Logger")


def test_the_machinery_needs_neither_torch_nor_lightning() -> None:
    """Errors on the command line are reported before slow imports, except those of dependencies."""
    code = """
import sys, types, pathlib
package = types.ModuleType("bcos_train")
package.__path__ = [sys.argv[1]]
sys.modules["bcos_train"] = package
import bcos_train.config.cli
sys.exit(bool({"torch", "pytorch_lightning"} & set(sys.modules)))
"""
    folder = Path(bcos_train.__file__).parent
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
