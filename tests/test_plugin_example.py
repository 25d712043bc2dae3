"""The example of TRAINING.md, run as it stands there."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bcos_train.run
from bcos_train import commands
from bcos_train.config import targets
from bcos_train.evaluation import METRICS, register_metric
from bcos_train.evaluation.scoring import HIGHER_IS_BETTER, SCORERS
from bcos_train.model import registry
from bcos_train.run import main as run_saved_config

SECTION = (Path(__file__).parents[1] / "TRAINING.md").read_text().partition("## Extend it in your own package")[2]
PYTHON, YAML, COMMANDS = re.findall(r"```(?:python|yaml|)\n(.*?)```", SECTION, re.DOTALL)[:3]
TINY = ("trainer.max_epochs=1", "trainer.progress=false", "limit_train=64", "limit_val=32", "num_workers=0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the two files, and afterwards everything as before."""
    for text in (PYTHON, YAML):
        path = tmp_path / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.partition("\n")[2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tables = (registry._BUILDERS, targets.REGISTERED, SCORERS, HIGHER_IS_BETTER)
    before = [table.copy() for table in tables]
    metrics = list(METRICS)
    yield
    forget()
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)  # type: ignore[arg-type]
    METRICS[:] = metrics


def forget() -> None:
    """As in a new process, where nobody has imported the plugin."""
    sys.modules.pop("my_package", None)
    registry._BUILDERS.pop("my_net", None)
    for table in (SCORERS, HIGHER_IS_BETTER):
        table.pop("positive_share", None)
    METRICS[:] = [name for name in METRICS if name != "positive_share"]


def run(line: str, *more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments, *more])
    (commands.train if name == "bcos-train" else commands.evaluate)()


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluate = COMMANDS.splitlines()
    run(train, *TINY, "explanation=none", monkeypatch=monkeypatch)
    (run_folder,) = Path("runs/digits/my_net").iterdir()
    assert "plugins:\n- my_package" in (run_folder / "config.yaml").read_text()
    assert json.loads((run_folder / "summary.json").read_text())

    # Without the plugin the run's config says what it needs, and imports nothing.
    forget()
    evaluate = evaluate.replace("runs/digits/my_net/default-…", str(run_folder))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(evaluate.replace("plugins=[my_package] ", "").partition(" explanation")[0], monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert "plugins=my_package: saved configs can't load plugins" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run", str(run_folder / "config.yaml")])
    assert run_saved_config() == 2
    assert "my_package" not in sys.modules

    run(evaluate, "explanation.n_images=4", "explanation.methods=[bcos]", monkeypatch=monkeypatch)
    scores = json.loads((run_folder / "explanations.json").read_text())
    assert "positive_share" in json.dumps(scores)
    monkeypatch.setattr(sys, "argv", ["run", str(run_folder / "config.yaml"), "plugins=[my_package]"])
    assert run_saved_config() == 0
    assert "already finished" in capsys.readouterr().out


def test_processes_under_torchrun_get_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(bcos_train.run.launch, "run_under_torchrun", lambda *arguments: calls.append(arguments) or 0)
    for plugins in ([], ["my_package", "another.one"]):
        assert bcos_train.run._restart({"plugins": plugins}, Path("runs/x"), plugins, 2) == 0
    folder = f"folder={Path('runs/x')}"
    assert [call[2:] for call in calls] == [(2, [folder]), (2, ["plugins=[my_package,another.one]", folder])]


def test_a_metric_of_ones_own() -> None:
    with pytest.raises(ValueError, match="a metric named 'sparsity' is registered already"):
        register_metric("sparsity", lambda case: case.maps.sum((1, 2)), higher_is_better=True)


def test_the_example_has_about_30_lines() -> None:
    assert len([line for line in PYTHON.splitlines() if line.strip()]) <= 38
