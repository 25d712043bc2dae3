"""The command ``python scripts/pareto_front.py``."""

from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.image import imread

COLUMNS = "step,epoch,val/acc1,explanation/energy_pointing,explanation/iou,explanation/energy_pointing/uniform"


def write_run(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("\n".join([COLUMNS, *lines]) + "\n")
    return folder


def test_table_and_figure(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["1,0,70,.5,.2,.1", "2,1,80,.6,.1,.1", "3,2,79.9,.6,.1,.1", "4,3,90,.3,.1,.1", "5,4,95,,,"]
    run = write_run(tmp_path / "run", rows)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "epoch-0004-step-4.ckpt").touch()
    assert script.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "| run | 1 | 0.700 | 0.500 | 0.200 | 0.100 | – |" in out
    assert "| run | 2 | 0.800 | 0.600 | 0.100 | 0.100 | – |" in out
    assert f"| run | 4 | 0.900 | 0.300 | 0.100 | 0.100 | {run}/checkpoints/epoch-0004-step-4.ckpt |" in out
    assert out.count("| run |") == 1 + 3
    assert imread(run / "pareto_front.png")[..., :3].std() > 0.03


def test_several_runs(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, [f"1,0,{score},.5,.2,.1"]) for name, score in (("a", 70), ("b", 80))]
    assert script.main([*map(str, runs), "--output", str(tmp_path / "front.png")]) == 0
    out = capsys.readouterr().out
    assert "| b | 1 |" in out
    assert "| a | 1 |" not in out
    assert (tmp_path / "front.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--score", "val/acc"], "no val/acc was logged; did you mean val/acc1?"), (["--scor", "x"], "no such option")],
)
def test_mistakes(
    script: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", ["1,0,70,.5,.2,.1"])
    assert script.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert script.main([str(tmp_path / "missing")]) == 2
    assert "no run folder, it has no metrics.csv" in capsys.readouterr().err


def test_no_epoch_with_all_scores(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", ["1,0,70,,,", "2,1,,.5,.2,.1"])
    assert script.main([str(run)]) == 2
    assert "no epoch has all scores" in capsys.readouterr().err
