"""How the trainer is set up for CUDA, on a machine that may have none."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from bcos_train.explanation import without_tf32
from bcos_train.runs.layout import LAST
from bcos_train.training import TrainerOptions, build

from .runs import assert_same_state


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(
    ("cuda", "deterministic", "benchmark"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_cuda(cuda: bool, deterministic: bool, benchmark: bool, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def make(**options: Any) -> Any:
        given.update(options)
        return MagicMock(precision=options["precision"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(pl, "Trainer", make)
    with without_tf32():  # which restores what was
        build.build_trainer(TrainerOptions(max_epochs=1, deterministic=deterministic, tf32=tf32))
        flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        assert flags == ((tf32, tf32) if cuda else (False, False))
    assert given["benchmark"] == benchmark
    assert given["deterministic"] == deterministic


def test_lightning_has_the_private_method_that_the_trainer_replaces() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    loop = build.build_trainer(TrainerOptions(max_epochs=1, accelerator="cpu")).fit_loop.epoch_loop
    assert loop._broadcast_sigterm_tensor is vars(loop)["_broadcast_sigterm_tensor"]
    assert loop._broadcast_sigterm_tensor() is None


def test_checkpoint_files_of_lightning(tmp_path: Path) -> None:
    io, content = build.VerifiedCheckpointIO(), {"n": 1, "tensor": torch.arange(3.0)}
    io.save_checkpoint(content, str(tmp_path / LAST))
    assert_same_state(io.load_checkpoint(str(tmp_path / LAST)), content)
    io.remove_checkpoint(str(tmp_path / LAST))
    assert not list(tmp_path.iterdir())
