"""A training step waits for the device once, alone and with other processes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bcos_train.runs.interrupt import StopFlag
from bcos_train.training import Checkpointing
from bcos_train.training.callbacks.checkpoint import Checkpointer
from bcos_train.training.callbacks.ema import EmaCallback

from .host_reads import ReadsPerStep
from .toys import fit, make_data, make_module

ROOT = Path(__file__).parents[2]


def reads_of_a_run(folder: Path, devices: int = 1) -> list[int]:
    reads, data = ReadsPerStep(), make_data(batch_size=4)
    # On the CPU alone `one_hot`, of which our loss makes use, looks at the values; an Adam that isn't fused reads its
    # number of steps, which it always keeps there.
    optimizer = partial(torch.optim.Adam, lr=1e-3, fused=True)
    options: dict[str, Any] = {"log_every_n_steps": 1000, "gradient_clip_val": 0.1, "loss": nn.CrossEntropyLoss()}
    module = make_module(data, optimizer=optimizer, **options)
    saver = Checkpointer(folder, Checkpointing(every_n_minutes=60), StopFlag())
    callbacks = (EmaCallback(0.9, 2, 0), saver, reads)
    with pytest.MonkeyPatch.context() as monkeypatch, reads.watching(monkeypatch):
        fit(folder, *callbacks, data=data, module=module, devices=devices)
    return reads.counts


def test_one_process(tmp_path: Path) -> None:
    assert reads_of_a_run(tmp_path) == [1] * 10  # 2 epochs of 6 steps, without the last one of each


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    result = subprocess.run(
        [*command, "tests.training.test_host_reads", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [1] * 10


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = reads_of_a_run(folder, devices=2)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
