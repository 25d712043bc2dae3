"""A wheel installed in a fresh environment trains from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def call(command: list[str], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DATA_ROOT")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes into the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    call([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."], source)
    (path,) = (source / "dist").iterdir()
    return path


def test_the_wheel_holds_all_modules_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    configs = {f"bcos_train/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert modules | configs | {"bcos_train/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"bcos_train", "bcos_train_commands.py"}


@pytest.mark.slow
def test_an_installed_wheel_trains_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # The dependencies are those of the environment that runs the tests; .pth files in there, such as that of an
    # editable installation of this package, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    call([*PIP, "--python", str(python), "install", "--no-deps", "--ignore-installed", str(wheel)], work)
    where = call([str(python), "-c", "import bcos_train; print(bcos_train.__file__)"], work)
    assert Path(where.strip()).is_relative_to(environment)

    tiny = ["trainer.max_epochs=1", "trainer.progress=false", "limit_train=64", "limit_val=32", "num_workers=0"]
    call([str(environment / "bin/bcos-train"), *tiny, "explanation=none"], work)
    (run,) = (work / "runs/digits/resnet20").iterdir()
    assert (run / "summary.json").exists()
    assert [path.name for path in work.iterdir()] == ["runs"]
    assert "Evaluate a network" in call([str(environment / "bin/bcos-evaluate"), "--help"], work)
