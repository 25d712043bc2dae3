"""TensorBoard and W&B get what metrics.csv gets, and the gallery; without a network where none is asked for."""

import json
import logging
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from pytorch_lightning.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.runs.layout import read_metrics
from bcos_train.training import loggers, wandb_logger

from .runs import TINY, compose, run_folder

SMALL = (*TINY, "limit_train=16", "limit_val=9", "trainer.max_epochs=1")


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
    overrides = [text for text in SMALL if text != "explanation=none"]
    overrides += ["logger=[wandb,tensorboard]", "logger.wandb.mode=offline"]
    overrides += ["explanation.gallery_images=2", "explanation.n_images=2"]
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


MODES = {
    "as configured": ({}, "offline", "offline"),
    "disabled by its mode": ({"WANDB_MODE": "disabled"}, "online", "disabled"),
    "disabled": ({"WANDB_DISABLED": "true"}, "online", "disabled"),
    "offline": ({"WANDB_MODE": "offline"}, "online", "offline"),
    "its old name": ({"WANDB_MODE": "dryrun"}, "online", "offline"),
    "the more restrictive": ({"WANDB_MODE": "online", "WANDB_DISABLED": "false"}, "disabled", "disabled"),
}


@pytest.mark.parametrize(("environment", "mode", "expected"), MODES.values(), ids=MODES)
def test_wandb_respects_the_environment(
    environment: dict[str, str],
    mode: loggers.Mode,
    expected: str,
    tmp_path: Path,
    network: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loggers.wandb_mode(mode, tmp_path) == expected
    with pytest.raises(BlockingIOError):
        network.accept()


@pytest.mark.parametrize("server", ["refuses", "does not answer"])
def test_wandb_without_a_network_logs_offline(
    server: str,
    tmp_path: Path,
    network: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if server == "refuses":
        network.close()
    monkeypatch.setattr(loggers, "CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it has read the environment of earlier tests
    logging.getLogger("bcos_train").setLevel(logging.NOTSET)
    logger = wandb_logger(folder=tmp_path, run_id="a")
    assert isinstance(logger, WandbLogger)
    assert logger._wandb_init["mode"] == "offline"
    (record,) = [record for record in caplog.records if record.name.startswith("bcos_train")]
    assert record.getMessage().startswith("W&B: no connection to the server (")
    assert f"to upload it later: wandb sync {tmp_path}/wandb/offline-run-*" in record.getMessage()


def test_wandb_with_a_network(tmp_path: Path, network: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer will do, also that there is nothing at this address."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()

    def answer() -> None:
        network.setblocking(True)
        connection, _ = network.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    assert loggers.wandb_mode("online", tmp_path) == "online"
    thread.join()
