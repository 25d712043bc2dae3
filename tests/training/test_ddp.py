"""Two processes on the CPU do what one does with the same global batch."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bcos_train.config import UserError
from bcos_train.model import create_model
from bcos_train.run import evaluate, train

from .runs import compose, final_state, metric_rows, run_folder

ROOT = Path(__file__).parents[2]
#: An odd number of validation images, a last batch that is smaller, accumulation.
SMALL = (
    "dataset.size=16",
    "limit_train=44",
    "limit_val=33",
    "batch_size=16",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.max_batch_per_device=4",
    "num_workers=0",
    "explanation=none",
    # Adam would turn the rounding of gradients near zero into whole steps.
    "optimizer=sgd",
    # Where two MaxOut units are equal but for rounding, either may win, and the gradients differ by more than rounding.
    "model.max_out=1",
    "ema={_target_: bcos_train.training.Ema, decay: 0.99, every_n_steps: 2}",
)
SELF_START = [sys.executable, "train.py", "trainer.devices=2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]

EVALUATE = [*TORCHRUN[:-1], "evaluate.py"]
EXPLANATION = (
    "explanation=default",
    "explanation.n_images=4",
    "explanation.gallery_images=0",
    "explanation.metrics=[completeness,alignment]",
)


def start(command: list[str], *overrides: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(path)])}
    return subprocess.run(
        [*command, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("command", "norm", "extra"),
    [
        pytest.param(SELF_START, "lnu-linear", (), id="own start, no batch statistics", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "bnu-linear", ("trainer.sync_batchnorm=true",), id="torchrun, synchronized uncentered"),
        pytest.param(SELF_START, "bn", ("trainer.sync_batchnorm=true",), id="own start, synchronized centered"),
    ],
)
def test_same_losses_as_one_process(command: list[str], norm: str, extra: tuple[str, ...], tmp_path: Path) -> None:
    overrides = (*SMALL, f"model.norm_layer={norm}", *extra)
    if extra:
        # With accumulation a device would see a part of the batch: statistics would differ by definition.
        overrides = (*overrides, "trainer.max_batch_per_device=null")
    assert train(compose(tmp_path / "one", *overrides)) == 0
    result = start(command, *overrides, f"runs={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    assert one.name == two.name
    rows = list(zip(metric_rows(one), metric_rows(two), strict=True))
    assert len(rows) == 6
    for a, b in rows:
        assert a.keys() == b.keys()
        for key in a:
            if a[key] and key not in ("step", "epoch"):
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), (key, a["step"])
    for key, value in final_state(one)["model"].items():
        assert value.allclose(final_state(two)["model"][key], rtol=1e-4, atol=1e-5), key


def test_evaluation_equals_that_of_one_process(tmp_path: Path) -> None:
    """Also the explanation metrics, which rank 0 measures by the predictions of all."""
    assert train(compose(tmp_path, *SMALL, "trainer.max_epochs=1", "dataset.size=32")) == 0
    run = run_folder(tmp_path)
    two = start(EVALUATE, f"run={run}", f"output={tmp_path / 'two'}", *EXPLANATION)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("top-1") == 1
    config = compose(tmp_path, *EXPLANATION, name="evaluate") | {"run": str(run), "output": str(tmp_path / "one")}
    assert evaluate(config, [text.partition("=")[0] for text in EXPLANATION]) == 0
    one, two = (json.loads((tmp_path / part / "evaluation.json").read_text()) for part in ("one", "two"))
    assert one.keys() == two.keys()
    assert {"explanation/completeness", "explanation/alignment"} <= one.keys()
    for key in one.keys() - {"seconds", "weights", "model", "dataset", "ema", "gallery"}:
        assert one[key] == pytest.approx(two[key], abs=1e-6), key


def test_fewer_validation_images_than_processes(tmp_path: Path) -> None:
    torch.save(create_model("resnet20").state_dict(), weights := tmp_path / "w.pth")
    overrides = ("model=resnet20", f"weights={weights}", "limit_val=1", f"output={tmp_path / 'out'}")
    result = start(EVALUATE, *overrides, "trainer.accelerator=cpu", "num_workers=0")
    assert "dataset: 1 validation sample(s) for 2 processes: every process needs at least one\n" in result.stderr
    assert f"{ROOT / 'src'}" not in result.stderr  # no traceback of ours
    assert result.returncode != 0
    assert not (tmp_path / "out").exists()


def test_batch_that_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be split over 2 processes: try 14 or 16"):
        train(compose(tmp_path, *SMALL, "batch_size=15", "trainer.devices=2"))


def test_wrong_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(
        UserError, match=r"torchrun started 2 processes, but trainer.devices=3 x trainer.num_nodes=1 is 3"
    ):
        train(compose(tmp_path, *SMALL, "trainer.devices=3"))


def test_several_nodes_need_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a launcher"):
        train(compose(tmp_path, *SMALL, "trainer.num_nodes=2"))


def test_a_mistake_that_rank_zero_finds_is_one_line(tmp_path: Path) -> None:
    mistake = ("dataset=imagefolder", f"dataset.root={tmp_path / 'missing'}", f"runs={tmp_path}")
    result = start(SELF_START, "trainer.accelerator=cpu", *mistake)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("dataset: ")
    assert "missing" in line


#: A plugin with which the disk is full when rank 0 saves for the second time.
FULL_DISK = """
import errno, os
from bcos_train.runs import checkpoint

dump, saved = checkpoint._dump, []

def refuse(content, file):
    saved.append(file)
    if len(saved) == 2 and "FULL_DISK" in os.environ:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")
    return dump(content, file)

checkpoint._dump = refuse
"""


@pytest.mark.slow
def test_a_full_disk_of_rank_zero_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    overrides = (*SMALL, "plugins=[full_disk]")
    monkeypatch.setenv("FULL_DISK", "1")
    result = start(SELF_START, *overrides, f"runs={tmp_path / 'full'}", path=tmp_path)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith(f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'last.ckpt': free some space and run")
    assert final_state(run_folder(tmp_path / "full"))["global_step"] == 3
