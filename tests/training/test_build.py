"""How the trainer is set up for CUDA, on a machine that may have none."""

from typing import Any
from unittest.mock import MagicMock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from bcos_train.explanation import without_tf32
from bcos_train.training import TrainerOptions, build


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


def test_lightning_still_asks_for_sigterm_where_it_is_answered() -> None:
    """The private method that the trainer overrides."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    trainer = build.build_trainer(TrainerOptions(max_epochs=1, accelerator="cpu"))
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor is build._nothing
