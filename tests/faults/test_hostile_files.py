"""Run folders that were damaged or prepared by someone: no code runs, nothing outside changes, no tracebacks."""

from pathlib import Path

import pytest

from bcos_train.runs.layout import CHECKPOINTS

from .campaign import TENTHS, Campaign, Machine, Run, assert_equal_exports, assert_equal_weights, tenths
from .hostile import damages
from .trials import Result

TEXT = "years of work"
#: Started and changed outside by any command: Hydra's folder of the job, which exists.
HARMLESS = ("os.mkdir",)


def check(result: Result, mark: Path, elsewhere: Path) -> None:
    assert not mark.exists(), "code was executed"
    assert elsewhere.read_text() == TEXT
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == [elsewhere.name]
    made = {line.partition(" ")[2] for line in result.outside if line.startswith("os.mkdir")}
    removed = {f"os.rmdir {path}" for path in made}  # temporary folders
    assert not [line for line in result.outside if not line.startswith(HARMLESS) and line not in removed], (
        result.outside
    )
    assert result.code in (0, 2), result.output
    assert "Traceback" not in result.output, result.output
    assert "\x1b" not in result.output, result.output
    if result.code:
        # A config has a line for each problem.
        assert result.is_one_line or "needs a value" in result.errors, result.output


def names(run: Run) -> list[str]:
    paths = (path for path in sorted(run.folder.rglob("*")) if path.is_file())
    return [str(path.relative_to(run.folder)) for path in paths]


@tenths
@pytest.mark.parametrize("state", ["interrupted", "finished"])
@pytest.mark.parametrize("command", ["train", "saved config", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_hostile_files(command: str, state: str, tenth: int, machine: Machine, campaign: Campaign) -> None:
    whole, _ = machine.finished
    source = whole if state == "finished" else machine.interrupted
    elsewhere = machine.folder / "elsewhere" / "thesis.txt"
    elsewhere.parent.mkdir(exist_ok=True)
    elsewhere.write_text(TEXT)
    mark = machine.folder / "mark"
    cases = [(name, key) for name in names(source) for key in damages(name, mark, elsewhere)]
    for name, key in cases[tenth::TENTHS]:
        if command == "saved config" and name != "config.yaml":
            continue
        with campaign.trial(f"{name}: {key}"):
            run = machine.copy(source)
            damages(name, mark, elsewhere)[key](run.folder / name)
            if command == "train":
                result = run.train()
            elif command == "saved config":
                result = run.train_saved_config()
            else:
                is_best = Path(name).name.startswith(("epoch-", "best"))
                result = run.evaluate(f"checkpoint={'best' if is_best else 'last'}")
            check(result, mark, elsewhere)
            if command == "train" and result.code == 0:
                # The checkpoints of a finished run are not repaired.
                (assert_equal_weights if state == "interrupted" else assert_equal_exports)(run, whole)
            machine.discard(run)


@pytest.fixture(autouse=True)
def no_marks_are_left(machine: Machine) -> None:
    """Marks of trials that failed don't let the following ones fail."""
    mark = machine.folder / "mark"
    if mark.is_dir():
        mark.rmdir()


def test_the_names_are_those_of_a_run(machine: Machine) -> None:
    files = {Path(name).name for name in names(machine.finished[0])}
    assert {"config.yaml", "metrics.csv", "last.ckpt", "last.ckpt.sha256", "best.json", "summary.json"} <= files
    assert (machine.interrupted.folder / CHECKPOINTS / "previous.ckpt").exists()
