"""The definitions stand on their own: without the folder ``nn/fast`` everything computes the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bcos_train

PACKAGE = Path(bcos_train.__file__).parent
TESTS = Path(__file__).parents[1]


def test_the_definitions_are_short() -> None:
    files = [path for path in (PACKAGE / "nn").rglob("*.py") if "fast" not in path.parts]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 1300


def test_layers_and_explanations_without_the_fast_path(tmp_path: Path) -> None:
    pytest.importorskip("bcos_train.nn.fast")
    shutil.copytree(PACKAGE, tmp_path / "bcos_train", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "bcos_train" / "nn" / "fast")
    # All of them in `make test-no-fast`.
    selected = [TESTS / "nn" / "test_conv.py", TESTS / "explanation" / "test_mode.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *map(str, selected)]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bcos_train.nn.without_fast"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    result = subprocess.run(
        command, env={**_environment(), "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:]


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
