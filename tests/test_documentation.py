"""The documentation: local links lead somewhere, and the commands of train.py and evaluate.py are valid."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from bcos_train.config import check
from bcos_train.config.composition import Composer, project_config_dir
from bcos_train.config.overrides import check_choices, read_overrides
from bcos_train.run import EvaluateConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "gpu.md"]
ROOTS = {"train": TrainConfig, "evaluate": EvaluateConfig}
COMPOSER = Composer(project_config_dir())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str]]:
    """``train`` or ``evaluate``, and the arguments; placeholders are replaced by a word. Each command once.

    Without those of the Model Zoo, which have a test of their own, and those after "$", which show messages.
    """
    found = set()
    for page in PAGES:
        text = re.sub(r"<!-- model zoo: written.*?<!-- model zoo: end -->", "", page.read_text(), flags=re.DOTALL)
        text = re.sub(r"<[\w ]+>|…", "x", text.replace("\\\n", "").replace("<model>", "resnet18"))
        for name, rest in re.findall(r"(?<!\$ )python (train|evaluate)\.py ([^`\n]*)", text):
            if "=" in (arguments := re.split(r" +#", rest)[0].strip()):
                found.add((name, " ".join(arguments.split())))
    return sorted(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    for target in (link or image for link, image in targets):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize(("name", "arguments"), commands(), ids=lambda text: text)
def test_command(name: str, arguments: str) -> None:
    sweep, *single = texts = shlex.split(arguments)
    if sweep == "-m":  # the first of several values
        texts = [text if "=[" in text else text.partition(",")[0] for text in single]
    keys = inspect.signature(ROOTS[name]).parameters
    written, problems = read_overrides(texts, COMPOSER, keys, lambda: COMPOSER.defaults(name))
    problems += check_choices(written.values(), COMPOSER, lambda: COMPOSER.defaults(name))
    assert problems == []
    assert check(COMPOSER.compose(name, list(written.values())), root=ROOTS[name]) == []
