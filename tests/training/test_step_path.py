"""How many of our files one optimizer step runs through: the cost of understanding it."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

import bcos_train
from bcos_train.model import create_model
from bcos_train.runs.interrupt import StopFlag
from bcos_train.training import Checkpointing
from bcos_train.training.callbacks.checkpoint import Checkpointer

from .toys import RandomSource, fit, make_data, make_module

ROOT = str(Path(bcos_train.__file__).parent)


class Trace(pl.Callback):
    """Collect the files of this package in which a function is called during the second step."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            sys.setprofile(self._profile)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            self.files.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))


def test_an_optimizer_step_runs_through_few_files(tmp_path: Path) -> None:
    data = make_data(RandomSource(num_classes=10))
    module = make_module(data, create_model("resnet20", num_classes=10), gradient_clip_val=0.01, epochs=1)
    trace = Trace()
    fit(tmp_path, Checkpointer(tmp_path, Checkpointing(), StopFlag()), trace, data=data, module=module, epochs=1)
    assert "training/module.py" in trace.files
    assert "nn/conv.py" in trace.files
    assert len(trace.files) <= 28, sorted(trace.files)
