"""metrics.csv: exact values, one row a step, and whole whenever the machine dies."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import read_metrics
from bcos_train.training.callbacks.metrics import CsvLogger

from ..runs import TINY, compose, metric_rows, run_folder

SMALL = (*TINY, "limit_train=16", "limit_val=9", "trainer.max_epochs=1")


def test_rows_are_appended(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    logger.log_metrics({"loss": torch.tensor(0.25), "epoch": 0}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,epoch\n1,0.5,0\n2,0.25,0\n"
    assert (tmp_path / "metrics.csv").stat().st_ino == inode, "appended, not written anew"


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    logger.log_metrics({"val/loss": 0.75, "epoch": 0}, step=1)
    logger.log_metrics({"loss": 0.25, "epoch": 1}, step=2)
    text = "step,loss,epoch,val/loss\n1,0.5,0,0.75\n2,0.25,1,\n"
    assert (tmp_path / "metrics.csv").read_text() == text
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "loss": 0.5, "epoch": 0, "val/loss": 0.75},
        {"step": 2, "loss": 0.25, "epoch": 1},
    ]


def test_values_survive_exactly(tmp_path: Path) -> None:
    values = [1e-30, 0.1, 1 / 3, 123456789.123456789, float("inf"), -1.5, 2**60]
    logger = CsvLogger(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"x": value}, step=step)
    logger.log_metrics({"x": float("nan")}, step=99)
    *read, last = [row["x"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert read == values
    assert last != last


def test_resuming_with_a_file(tmp_path: Path) -> None:
    first = CsvLogger(tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 2, "epoch": 0}, step=step)
    second = CsvLogger(tmp_path)
    second.drop_after(2)
    second.log_metrics({"loss": 9.0, "epoch": 0}, step=3)
    second.log_metrics({"new": 1.0, "epoch": 0}, step=3)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,epoch,new\n1,0.5,0,\n2,1.0,0,\n3,9.0,0,1.0\n"


def test_dropping_no_rows_leaves_the_file(tmp_path: Path) -> None:
    CsvLogger(tmp_path).drop_after(-1)
    assert not list(tmp_path.iterdir())
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    logger.drop_after(1)
    assert (tmp_path / "metrics.csv").stat().st_ino == inode


@pytest.mark.parametrize("cut", range(1, 7))
def test_incomplete_line_is_dropped(cut: int, tmp_path: Path) -> None:
    """The machine died while a row was being appended: a number cut short is a wrong number."""
    logger = CsvLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 0.125}, step=step)
    path = tmp_path / "metrics.csv"
    os.truncate(path, path.stat().st_size - cut)
    again = CsvLogger(tmp_path)
    again.log_metrics({"loss": 0.25}, step=2)
    assert path.read_text() == "step,loss\n1,0.125\n2,0.25\n"


GOOD = "step,loss\n1,0.5\n2,0.25\n"


@pytest.mark.parametrize(
    ("content", "kept", "problem"),
    [
        (b"\x00\xff\x80" * 50 + b"\n", 0, "its first line doesn't name"),
        (b"", 0, "it is empty"),
        (b"loss,epoch\n0.5,1\n", 0, "its first line doesn't name"),
        (b"step," + b"x" * 200_000 + b"\n1,2\n", 0, "its first line doesn't name"),
        (b"step,step\n1,1\n", 0, "its first line doesn't name"),
        (GOOD.encode() + b"3,0.1,7\n", 2, "line 4 can't be read"),
        (GOOD.encode() + b"3\n4,0.1\n", 3, "line 4 can't be read"),
        (b"step,loss\n1,0.5\nx,\xff\n2,0.25\n", 2, "line 3 can't be read"),
        (b"step,loss\n,0.5\n2,0.25\n", 1, "line 2 can't be read"),
        (b"step,loss\n5,0.5\n2,0.25\n", 1, "line 3 can't be read"),
        (None, 0, "it is a folder"),
    ],
)
def test_damage_is_repaired(
    content: bytes | None, kept: int, problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    logger = CsvLogger(tmp_path)
    (record,) = caplog.records
    assert f"metrics.csv is damaged ({problem}" in record.getMessage()
    assert f"{kept} rows were kept" in record.getMessage()
    assert content is None or (tmp_path / "metrics.csv.damaged").read_bytes() == content
    logger.log_metrics({"loss": 1.0, "new": 2.0}, step=9)
    assert len(read_metrics(path)) == kept + 1
    assert read_metrics(path)[-1] == {"step": 9, "loss": 1.0, "new": 2.0}


def test_a_link_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis.txt"
    target.write_text("step,loss\n1,0.5\nyears of")
    (tmp_path / "metrics.csv").symlink_to(target)
    CsvLogger(tmp_path).log_metrics({"loss": 1.0}, step=2)
    assert target.read_text() == "step,loss\n1,0.5\nyears of"
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 2, "loss": 1.0}]


def test_an_empty_column_stays_in_place(tmp_path: Path) -> None:
    """Rows that are appended have the columns of the file, also those without a value."""
    (tmp_path / "metrics.csv").write_text("step,loss,acc\n1,,5\n")
    CsvLogger(tmp_path).log_metrics({"acc": 6}, step=2)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "acc": 5}, {"step": 2, "acc": 6}]


@pytest.mark.parametrize("step", range(2))
def test_crash_while_writing_anew(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the old one or the new one."""
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    before = (tmp_path / "metrics.csv").read_text()

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, ("fsync", "replace")[step], die)
        with pytest.raises(KeyboardInterrupt):
            logger.log_metrics({"new": 1.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == before
    assert CsvLogger(tmp_path)._rows == [{"step": 1, "loss": 0.5}]


def test_steps_without_a_checkpoint_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first checkpoint, a run begins again, and so does its file."""
    assert train(compose(tmp_path / "whole", *SMALL)) == 0

    def die(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(files, "save", die)
        with pytest.raises(ZeroDivisionError):
            train(compose(tmp_path / "again", *SMALL))
    assert len(metric_rows(run_folder(tmp_path / "again"))) == 2
    assert train(compose(tmp_path / "again", *SMALL)) == 0
    assert metric_rows(run_folder(tmp_path / "again")) == metric_rows(run_folder(tmp_path / "whole"))
