"""Two processes that train a compiled network stay together, and take the steps that they take uncompiled."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bcos_train import create_model
from bcos_train.runs.layout import read_metrics

from .toys import RandomSource, fit, make_data, make_module

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(5, 1, 1), (1, 1, 1)], ids=["block by block", "as a whole"])
def test_same_steps(layers: tuple[int, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    result = subprocess.run(
        [*command, "tests.training.test_compiled_ddp", str(tmp_path), *map(str, layers)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [read_metrics(tmp_path / str(compiled) / "metrics.csv") for compiled in (False, True)]
    assert len(steps[0]) == len(steps[1]) > 4
    for plain, compiled in zip(*steps, strict=True):
        if "train/loss_step" in plain:
            assert compiled["train/loss_step"] == pytest.approx(plain["train/loss_step"], rel=1e-3)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for key, value in ranks[0].items():
        if "running" not in key:  # statistics are each device's own
            assert torch.equal(value, ranks[1][key]), key


def run(folder: Path, layers: tuple[int, ...]) -> None:
    # What splits graphs for DDP is before the compiler; generating code would take minutes here.
    torch.compile = partial(torch.compile, backend="aot_eager")
    for compiled in (False, True):
        data = make_data(RandomSource(n_train=44))  # the last batch of 8 is one of 4
        torch.manual_seed(0)
        model = create_model("resnet20", num_classes=4, layers=layers, max_out=1)
        optimizer = partial(torch.optim.SGD, lr=1e-2)
        module = make_module(data, model, compiled_batch_size=4 if compiled else None, optimizer=optimizer)
        fit(folder / str(compiled), data=data, module=module, devices=2)
    assert str(module.compilation) == ("block by block, 10 parts" if layers[0] > 1 else "as a whole")
    torch.save(model.state_dict(), folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), tuple(map(int, sys.argv[2:])))
