"""Runs on data with several labels, boxes and groups: what is logged, and what is refused before training."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cifar10_files import write_cifar10
from torch import multiprocessing

from bcos_train.config import UserError
from bcos_train.run import evaluate, train
from bcos_train.runs.layout import read_metrics
from bcos_train.training.callbacks.explanations import _single_labels
from bcos_train.training.score import ClassificationScore, MultiLabelScore

from .runs import compose, run_folder

EMA = "ema={_target_: bcos_train.training.Ema, decay: 0.5, every_n_steps: 1}"
SMALL = (
    "dataset=pasted",
    "dataset.size=32",
    "batch_size=8",
    "limit_train=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "num_workers=0",
    "explanation=none",
)
SEVERAL = (*SMALL, "dataset.max_objects=3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("cifar10"))


def _config(root: Path, runs: Path, *overrides: str, name: str = "train") -> dict[str, Any]:
    config = compose(runs, *overrides, name=name)
    return {**config, "dataset": {**config["dataset"], "root": str(root)}}


def _evaluate(root: Path, runs: Path, *overrides: str) -> dict[str, Any]:
    folder = run_folder(runs)
    config = {**_config(root, runs, *overrides, name="evaluate"), "run": str(folder), "output": str(runs / "out")}
    assert evaluate(config, [*(text.partition("=")[0] for text in overrides), "run", "output"]) == 0
    content: dict[str, Any] = json.loads((runs / "out" / "evaluation.json").read_text())
    return content


def test_several_labels(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(_config(root, tmp_path, *SEVERAL, EMA)) == 0
    rows = read_metrics(run_folder(tmp_path) / "metrics.csv")
    logged = {key: value for row in rows for key, value in row.items() if "/" in key}
    assert {key for key in logged if key.startswith(("train/", "val"))} == {
        *("train/loss", "train/f1"),
        *(f"{part}/{score}" for part in ("val", "val_ema") for score in ("loss", "f1", "map")),
    }
    assert "validation F1" in capsys.readouterr().out
    (best,) = json.loads((run_folder(tmp_path) / "summary.json").read_text())["best"]
    assert best["file"].startswith("epoch-0001-val_f1-")
    result = _evaluate(root, tmp_path, *SEVERAL, "use_ema=false")
    for key in ("loss", "f1", "map"):
        assert result[key] == pytest.approx(logged[f"val/{key}"], rel=1e-5)
    assert result["count"] == 30
    assert "correct1" not in result
    output = capsys.readouterr().out
    assert "micro-F1 [%]" in output
    assert "mAP [%]" in output
    assert "top-1" not in output
    assert (tmp_path / "out" / "gallery.png").exists()


def test_explanations_with_several_labels(root: Path, tmp_path: Path) -> None:
    changes = ("explanation=default", "explanation.n_images=4", "explanation.gallery_images=2")
    config = _config(root, tmp_path, *SEVERAL, *changes)
    assert train(config) == 0
    folder = run_folder(tmp_path)
    assert len(list((folder / "explanations").glob("*.png"))) == 1
    (row,) = [row for row in read_metrics(folder / "metrics.csv") if "explanation/completeness" in row]
    assert math.isfinite(row["explanation/completeness"])


def test_groups(root: Path, tmp_path: Path) -> None:
    settings = (*SMALL, "dataset.background_correlation=0.5", "checkpointing.monitor=val_ema/worst_group_acc1")
    assert train(_config(root, tmp_path, *settings, EMA)) == 0
    rows = read_metrics(run_folder(tmp_path) / "metrics.csv")
    (row,) = [row for row in rows if "val/loss" in row]
    for part in ("val", "val_ema"):
        shares = {key: value for key, value in row.items() if key.startswith(f"{part}/group_acc1/")}
        assert 10 <= len(shares) <= 30
        assert all(key.count("_on_") == 1 for key in shares)
        assert row[f"{part}/worst_group_acc1"] == min(shares.values())
    result = _evaluate(root, tmp_path, *settings, "use_ema=false")
    assert result["worst_group_acc1"] == row["val/worst_group_acc1"]
    assert result["correct1"] == round(result["acc1"] * 30 / 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (*SEVERAL, "distillation=kd", "distillation.teacher=resnet20", "distillation.teacher_weights=random"),
            r"^distillation: a teacher is for one label per image, pasted has several",
        ),
        ((*SEVERAL, "loss=cross_entropy"), r"^loss: cross-entropy is for one label per image, pasted has several"),
        (
            (*SEVERAL, "augmentation.cutmix_alpha=1.0"),
            r"^augmentation.cutmix_alpha=1.0: pasted has several labels per image, which mixed images can't have",
        ),
        (
            (*SMALL, "augmentation.mixup_alpha=0.2"),
            r"^augmentation.mixup_alpha=0.2: pasted has boxes, which mixed images can't have: aug",
        ),
        (
            (*SMALL, "augmentation=imagenet_ra", "augmentation.mixup_alpha=0.0"),
            r"^dataset: .*: RandAugment doesn't",
        ),
        ((*SEVERAL, "checkpointing.monitor=val/acc1"), r"^checkpointing.monitor=val/acc1: .*; did you mean val/f1\?"),
        (
            (*SMALL, "checkpointing.monitor=val/worst_group_acc1"),
            r"^checkpointing.monitor=val/worst_group_acc1: no ",
        ),
        ((*SEVERAL, "model.num_classes=12"), r"^model.num_classes=12: pasted has 10 classes, and several labels"),
    ],
)
def test_combinations_that_cannot_work(root: Path, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(_config(root, tmp_path, *settings))
    assert "\n" not in str(caught.value)


def test_grids_use_images_with_a_single_label() -> None:
    labels = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert _single_labels(labels).tolist() == [1, -1, -1, 0]


def _update(rank: int, port: int, parts: list[tuple[torch.Tensor, ...]], results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    score, groups = MultiLabelScore(average_precision=True), ClassificationScore(["a", "b", "c"])
    for loss, logits, target, group in parts[rank::2]:
        score.update(loss, logits, target)
        groups.update(loss, logits, target.argmax(1), group)
    results[rank] = {**score.compute(), **groups.compute()}
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    torch.manual_seed(0)
    parts = [
        (torch.rand(()), torch.randn(n, 4), (torch.rand(n, 4) < 0.4).float(), torch.randint(3, (n,))) for n in (5, 3, 4)
    ]
    score, groups = MultiLabelScore(average_precision=True), ClassificationScore(["a", "b", "c"])
    for loss, logits, target, group in parts:
        score.update(loss, logits, target)
        groups.update(loss, logits, target.argmax(1), group)
    expected = {**score.compute(), **groups.compute()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_update, args=(port, parts, results), nprocs=2)
        assert results[0] == results[1] == pytest.approx(expected)
