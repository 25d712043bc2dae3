"""metrics.csv, the run folder with its name and lock, TensorBoard and W&B."""

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.training import checkpoint as files
from bcos_train.training import wandb_logger
from bcos_train.training.logging import CsvLogger, read_metrics
from bcos_train.training.run_folder import find_run_folder, locked, run_hash, write_json

from .runs import TINY, compose, metric_rows, run_folder, signal_at

SMALL = (*TINY, "limit_train=16", "limit_val=9", "trainer.max_epochs=1")


# ---- metrics.csv


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


def test_going_on_with_a_file(tmp_path: Path) -> None:
    first = CsvLogger(tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 2, "epoch": 0}, step=step)
    second = CsvLogger(tmp_path)
    second.forget_after(2)
    second.log_metrics({"loss": 9.0, "epoch": 0}, step=3)
    second.log_metrics({"new": 1.0, "epoch": 0}, step=3)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,epoch,new\n1,0.5,0,\n2,1.0,0,\n3,9.0,0,1.0\n"


def test_forgetting_nothing_touches_nothing(tmp_path: Path) -> None:
    CsvLogger(tmp_path).forget_after(-1)
    assert not list(tmp_path.iterdir())
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    logger.forget_after(1)
    assert (tmp_path / "metrics.csv").stat().st_ino == inode


@pytest.mark.parametrize("cut", range(1, 7))
def test_half_a_line_is_dropped(cut: int, tmp_path: Path) -> None:
    """The machine died while a row was being appended: a number cut short is a wrong number."""
    logger = CsvLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 0.125}, step=step)
    path = tmp_path / "metrics.csv"
    os.truncate(path, path.stat().st_size - cut)
    again = CsvLogger(tmp_path)
    again.log_metrics({"loss": 0.25}, step=2)
    assert path.read_text() == "step,loss\n1,0.125\n2,0.25\n"


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


# ---- the run's name


@pytest.fixture(scope="module")
def base_hash() -> str:
    return run_hash(compose(Path("runs"), *TINY))


WITHOUT_EFFECT = (
    "num_workers=3",
    "trainer.devices=2",
    "trainer.num_nodes=2",
    "trainer.accelerator=gpu",
    "trainer.max_batch_per_device=4",
    "trainer.channels_last=true",
    "trainer.progress=true",
    "trainer.log_every_n_steps=7",
    "logger=wandb",
    "logger=[wandb,tensorboard]",
    "explanation=default",
    "checkpointing.keep_best=5",
    "name=other",
    "resume=false",
)
WITH_EFFECT = (
    "optimizer.lr=0.01",
    "optimizer=sgd",
    "seed=1",
    "model=resnet32",
    "model.b=1.5",
    "augmentation=crop_flip",
    "augmentation.mixup_alpha=0.5",
    "augmentation.train.degrees=5.0",
    "batch_size=16",
    "trainer.max_epochs=3",
    "trainer.precision=bf16",
    "trainer.gradient_clip_val=0.1",
    "trainer.sync_batchnorm=true",
    "schedule=step",
    "loss=cross_entropy",
    "limit_train=8",
    "limit_val=8",
    "ema=null",
    "dataset.val_fraction=0.3",
    "encoding._target_=bcos_train.dataset.Standardize",
)


@pytest.mark.parametrize("override", WITHOUT_EFFECT)
def test_hash_ignores_what_changes_no_result(override: str, base_hash: str) -> None:
    assert run_hash(compose(Path("elsewhere"), *TINY, override)) == base_hash


def test_hash_depends_on_what_changes_results(base_hash: str) -> None:
    hashes = {override: run_hash(compose(Path("runs"), *TINY, override)) for override in WITH_EFFECT}
    assert len({*hashes.values(), base_hash}) == len(WITH_EFFECT) + 1, hashes


@pytest.mark.parametrize(
    ("dataset", "counts"), [("imagefolder", True), ("cifar10", False), ("imagenet", False)]
)
def test_folder_counts_where_it_says_what_is_in_it(dataset: str, counts: bool, tmp_path: Path) -> None:
    def named(root: str) -> str:
        return run_hash(compose(tmp_path, f"dataset={dataset}", f"dataset.root={root}"))

    assert (named("/a") != named("/b")) == counts
    # The same folder, written otherwise.
    assert named("/a") == named("/a/") == named("/b/../a")
    assert named("x") == named(f"{os.getcwd()}/x")
    assert named('"~/x"') == named(os.path.expanduser("~/x"))


def test_hash_does_not_change_the_config(tmp_path: Path) -> None:
    config = compose(tmp_path, "dataset=imagefolder", "dataset.root=x")
    before = json.dumps(config)
    run_hash(config)
    assert json.dumps(config) == before


# ---- the run folder


def test_new_folders_are_counted(tmp_path: Path) -> None:
    base = tmp_path / "name-1234"
    assert find_run_folder(base, resume=True).path == base
    assert find_run_folder(base, resume=False).path == base
    base.mkdir()
    assert find_run_folder(base, resume=False).path == tmp_path / "name-1234-2"
    (tmp_path / "name-1234-2").mkdir()
    folder = find_run_folder(base, resume=False)
    assert folder.path == tmp_path / "name-1234-3"
    assert (folder.resume_from, folder.finished, folder.complaints) == (None, False, ())


def test_what_is_found_in_a_folder(tmp_path: Path) -> None:
    files.save({"n": 1}, tmp_path / "checkpoints" / files.LAST)
    files.save({"n": 2}, tmp_path / "checkpoints" / files.LAST)
    folder = find_run_folder(tmp_path, resume=True)
    assert folder.resume_from == folder.checkpoints / files.LAST
    assert not folder.finished
    (tmp_path / "checkpoints" / files.LAST).write_bytes(b"")
    write_json(tmp_path / "summary.json", {})
    folder = find_run_folder(tmp_path, resume=True)
    assert folder.resume_from == folder.checkpoints / files.PREVIOUS
    assert folder.finished
    assert len(folder.complaints) == 1


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that holds the lock of a folder."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    pid = os.fork()
    if pid == 0:
        with locked(folder):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    yield pid, folder
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_process_is_refused(other_process: tuple[int, Path]) -> None:
    _, folder = other_process
    with pytest.raises(ValueError, match="another process is training in .*: wait, stop it, or give name=") as caught:
        locked(folder).__enter__()
    assert "\n" not in str(caught.value)


def test_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        locked(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path), pytest.raises(ValueError, match="another process"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


def test_second_run_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(tmp_path, *SMALL)
    signal_at(monkeypatch, 0)
    assert train(config) == 143
    folder = run_folder(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with locked(folder), pytest.raises(UserError, match="another process is training in"):
        train(config)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to .*file/digits.*: Not a directory"):
        train(compose(tmp_path / "file", *SMALL))


# ---- TensorBoard and W&B


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What stands for the W&B server: nobody may call it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_SILENT", "true")
        yield server


def wandb_records(path: Path) -> Iterator[Any]:
    """The records in an offline run's file, which is a log in LevelDB's format: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def wandb_content(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The latest value of each metric, and the config."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    metrics, config = {}, {}
    for record in wandb_records(path):
        for item in record.history.item:
            metrics["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
    return metrics, config


def test_both_loggers(tmp_path: Path, network: socket.socket) -> None:
    """Twice in one process, as the jobs of a sweep are."""
    overrides = (*(text for text in SMALL if text != "explanation=none"), "logger=[wandb,tensorboard]",
                 "logger.wandb.mode=offline", "explanation.gallery_images=2", "explanation.metric_images=2")  # fmt: skip
    for seed in (1, 2):
        assert train(compose(tmp_path / str(seed), *overrides, f"seed={seed}")) == 0
    with pytest.raises(BlockingIOError):
        network.accept()
    ids = []
    for seed in (1, 2):
        folder = run_folder(tmp_path / str(seed))
        rows = read_metrics(folder / "metrics.csv")
        logged = {key for row in rows for key in row} - {"step"}
        assert {"train/loss", "val/acc1", "val_ema/acc1", "lr", "explanation/alignment"} <= logged

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert logged <= set(events.Tags()["scalars"])
        assert events.Tags()["images"] == ["explanation/gallery"]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss_step")] == [
            (row["step"], row["train/loss_step"]) for row in rows
        ]

        metrics, config = wandb_content(folder)
        assert logged <= metrics.keys()
        assert metrics["val/loss"] == rows[-1]["val/loss"]
        assert metrics["trainer/global_step"] == 2
        assert any(key.startswith("explanation/gallery") for key in metrics)
        assert config["seed"] == seed
        assert config["optimizer"]["lr"] == 0.001
        assert len(list(folder.glob("wandb/offline-run-*/files/media/images/explanation/gallery_*.png"))) == 1
        ids.append((folder / ".wandb-id").read_text())
    assert ids[0] != ids[1]


def test_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path) -> None:
    """And a run in another folder never does, also of the same name."""
    ids = {}
    for name in ("default-1a2b3c4d", "default-1a2b3c4d-2"):
        folder = tmp_path / name
        folder.mkdir()
        ids[name] = [str(wandb_logger(folder=folder, run_id=name).version) for _ in range(2)]
        assert ids[name][0] == ids[name][1]
    assert len({value for pair in ids.values() for value in pair}) == 2


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_logger_that_is_not_installed(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.loggers import tensorboard, wandb

    class Missing(str):
        def __bool__(self) -> bool:
            return False

    module = tensorboard if logger == "tensorboard" else wandb
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE", "_WANDB_AVAILABLE"):
        for place in (module, sys.modules["lightning_fabric.loggers.tensorboard"]):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, Missing(f"{logger} is not there"))
    with pytest.raises(UserError, match=rf"^logger: .*{logger}"):
        train(compose(tmp_path, *SMALL, f"logger={logger}"))


def test_wandb_without_a_key_is_refused_before_training(
    tmp_path: Path, network: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^logger.wandb: .*logger.wandb.mode=offline"):
        train(compose(tmp_path / "runs", *SMALL, "logger=wandb"))
    assert not list(tmp_path.rglob("metrics.csv"))
