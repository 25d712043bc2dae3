"""Files at the top: the lock file, the citation, the issue templates."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import bcos_train

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def normalized(requirement: str) -> str:
    """Name of the distribution that a requirement is for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_the_lock_file_pins_every_dependency_with_hashes() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {
        normalized(text) for text in [*PROJECT["dependencies"], *(text for group in extras.values() for text in group)]
    }
    pinned = set(re.findall(r"^([a-z0-9-]+)==", LOCK, re.MULTILINE))
    assert wanted <= pinned
    for entry in re.split(r"\n(?=[a-z0-9])", LOCK.strip()):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


def test_the_lock_file_names_no_index_and_no_folder() -> None:
    assert re.findall(r"\w+://\S+|--\S*index\S*|--find-links|(?:^|\s)/\S+|(?:^|\s)\.\S*/", LOCK) == []


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == bcos_train.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize(
    "path",
    [".pre-commit-config.yaml", *map(str, sorted(ROOT.glob(".github/**/*.yml")))],
    ids=lambda path: Path(path).name,
)
def test_yaml_files_can_be_read(path: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / path).read_text()), dict)
