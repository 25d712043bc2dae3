"""What the trainer is told, and how a global batch is split."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.training import TrainerOptions
from bcos_train.training.options import BatchSplit, default_workers, split_batch

from .runs import TINY, compose


@pytest.mark.parametrize(
    ("batch", "world", "limit", "accumulate", "per_device"),
    [
        (64, 1, None, 1, 64),
        (256, 4, None, 1, 64),
        (256, 4, 64, 1, 64),
        (256, 4, 63, 2, 32),
        (256, 4, 100, 1, 64),
        (256, 2, 16, 8, 16),
        (96, 1, 40, 3, 32),
        (7, 1, 4, 7, 1),
        (1, 1, 1, 1, 1),
        (8, 8, 4, 1, 1),
    ],
)
def test_split(batch: int, world: int, limit: int | None, accumulate: int, per_device: int) -> None:
    split = split_batch(batch, world, limit)
    assert split == BatchSplit(batch, world, accumulate, per_device)
    assert split.world * split.accumulate * split.per_device == batch


def test_every_split_is_equal_fits_and_is_the_largest() -> None:
    for batch in range(1, 40):
        for world in (n for n in range(1, 6) if batch % n == 0):
            for limit in range(1, 12):
                split = split_batch(batch, world, limit)
                assert split.world * split.accumulate * split.per_device == batch
                assert split.per_device <= limit
                share = batch // world
                assert not [n for n in range(split.per_device + 1, min(limit, share) + 1) if share % n == 0]


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (10, 4, r"batch_size=10, the global one, can't be split over 4 processes: try 8 or 12$"),
        (3, 4, r"can't be split over 4 processes: try 4$"),
        (0, 1, "batch_size=0: at least 1"),
        (-8, 2, "batch_size=-8: at least 1"),
    ],
)
def test_uneven_split(batch: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(batch, world, None)


def test_words_of_the_banner() -> None:
    assert str(split_batch(64, 1, None)) == "64"
    assert str(split_batch(256, 4, 32)) == "256 = 4 process(es) x 2 accumulated x 32"


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 0), (3, 1, 2), (8, 1, 7), (64, 1, 63), (64, 8, 7), (8, 4, 0), (8, 16, 0)],
)
def test_default_workers(cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers


def test_default_workers_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, workers in ((None, 0), (6, 5)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_workers() == workers


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_epochs", 0, "trainer.max_epochs=0: at least 1"),
        ("num_nodes", 0, "trainer.num_nodes=0: at least 1"),
        ("val_every_n_epochs", 0, "trainer.val_every_n_epochs=0: at least 1"),
        ("log_every_n_steps", 0, "trainer.log_every_n_steps=0: at least 1"),
        ("max_batch_per_device", 0, "trainer.max_batch_per_device=0: at least 1"),
        ("devices", 0, "trainer.devices=0: at least 1, or auto"),
        ("devices", -1, "trainer.devices=-1: at least 1, or auto"),
        ("gradient_clip_val", 0, "trainer.gradient_clip_val=0: more than 0, or null"),
        ("gradient_clip_val", -1.0, "trainer.gradient_clip_val=-1.0: more than 0, or null"),
    ],
)
def test_options_are_checked(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerOptions(**{"max_epochs": 1, option: value})


@pytest.mark.parametrize(
    ("accelerator", "channels_last", "expected"),
    [("auto", None, False), ("mps", None, False), ("cpu", None, True), ("mps", True, True)],
)
def test_apples_gpus_keep_the_contiguous_format(
    accelerator: Any, channels_last: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    given = TrainerOptions(max_epochs=1, accelerator=accelerator, channels_last=channels_last)
    assert given.uses_channels_last == expected


@pytest.mark.parametrize(
    ("gpus", "options", "processes", "channels_last"),
    [
        pytest.param(0, {}, 1, True, id="no GPU"),
        pytest.param(4, {}, 4, True, id="all GPUs"),
        pytest.param(4, {"devices": 2}, 2, True, id="some"),
        pytest.param(4, {"accelerator": "cpu"}, 1, True, id="CPU beside GPUs"),
        pytest.param(4, {"accelerator": "cpu", "devices": 3}, 3, True, id="processes on the CPU"),
        pytest.param(4, {"channels_last": False}, 4, False, id="memory format as given"),
        pytest.param(0, {"channels_last": False}, 1, False, id="memory format as given, CPU"),
    ],
)
def test_devices(
    gpus: int, options: dict[str, Any], processes: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = TrainerOptions(max_epochs=1, num_nodes=2, **options)
    assert given.processes_per_node == processes
    assert given.world_size == 2 * processes
    assert given.uses_channels_last == channels_last


def test_launcher_decides_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert TrainerOptions(max_epochs=1).processes_per_node == 3
    assert TrainerOptions(max_epochs=1, devices=2).processes_per_node == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.num_nodes=2",), "trainer.num_nodes=2 needs a launcher: srun, torchrun or submitit"),
        (("trainer.devices=3",), r"batch_size=8, the global one, can't be split over 3 processes: try 6 or 9"),
        (("trainer.devices=0",), "trainer.devices=0: at least 1, or auto"),
        (("batch_size=0",), "batch_size=0: at least 1"),
        (("num_workers=-1",), "num_workers must be at least 0, not -1"),
    ],
)
def test_mistakes_come_before_anything_is_made(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(compose(tmp_path, *TINY, *overrides))
    assert not list(tmp_path.iterdir())


def test_launcher_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    problem = r"torchrun started 4 processes on 1 node, but trainer.devices=2 x trainer.num_nodes=1 is 2"
    with pytest.raises(UserError, match=problem):
        train(compose(tmp_path, *TINY, "trainer.devices=2"))
