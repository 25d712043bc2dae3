"""Reading a run folder."""

from pathlib import Path

from bcos_train.runs.layout import checkpoints_by_epoch, read_metrics


def test_metrics_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,val/acc1\n1,0,\n2,0,50.5\n")
    assert read_metrics(path) == [{"step": 1, "epoch": 0}, {"step": 2, "epoch": 0, "val/acc1": 50.5}]


def test_checkpoints_are_listed_by_epoch(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt", "epoch-0010-val_acc1-9.ckpt", "epoch-0002-val_acc1-8.ckpt", "epoch-x-1.ckpt"):
        (folder / name).touch()
    found = checkpoints_by_epoch(tmp_path)
    assert list(found) == [2, 10]
    assert found[10].name == "epoch-0010-val_acc1-9.ckpt"
    assert checkpoints_by_epoch(tmp_path / "none") == {}
