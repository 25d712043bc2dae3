"""When checkpoints are saved, which are kept, and that a killed run goes on from them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from bcos_train.config import UserError, instantiate
from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.checkpoint import LAST, PREVIOUS
from bcos_train.runs.folder import find_checkpoint
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.training import Checkpointing, Classifier
from bcos_train.training.build import check_monitor
from bcos_train.training.callbacks import checkpoint as module_under_test
from bcos_train.training.callbacks.checkpoint import Checkpointer, UnknownMonitor
from bcos_train.training.config import TrainConfig
from bcos_train.training.module import NonFiniteLoss

from ..runs import TINY, assert_same_state, compose, final_state, metric_rows, run_folder
from ..toys import fit, make_data, make_module

ROOT = Path(__file__).parents[3]
SMALL = (*TINY, "limit_train=16", "limit_val=9")


class Quality(pl.Callback):
    """Logs a given score after each epoch."""

    def __init__(self, scores: Sequence[float | None]) -> None:
        self.scores = scores

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = self.scores[trainer.current_epoch]
        if score is not None:
            pl_module.log_now({"quality": score})


class Recorder(Checkpointer):
    """Notes the optimizer steps at which ``last.ckpt`` was written."""

    def __init__(self, folder: Path, options: Checkpointing, stop: StopFlag | None = None) -> None:
        super().__init__(folder, options, stop or StopFlag())
        self.saved_at: list[int] = []

    def _write_best(self) -> None:
        super()._write_best()
        if (self.folder / LAST).exists():
            self.saved_at.append(files.load(self.folder / LAST)["global_step"])


def run_scores(tmp_path: Path, scores: Sequence[float | None], **options: Any) -> Checkpointer:
    saver = Recorder(tmp_path, Checkpointing(**{"monitor": "quality", **options}))
    fit(tmp_path, Quality(scores), saver, epochs=len(scores))
    return saver


def kept_epochs(folder: Path) -> list[int]:
    """Epochs of the best checkpoints there, each with its digest, checked against ``best.json``."""
    listed = json.loads((folder / "best.json").read_text())
    names = {path.name for path in folder.glob("epoch-*.ckpt")}
    assert {entry["file"] for entry in listed} == names
    assert {f"{name}.sha256" for name in names} == {path.name for path in folder.glob("epoch-*.sha256")}
    for entry in listed:
        # 3 steps an epoch: the file is that of its epoch.
        assert files.load(folder / entry["file"])["global_step"] == 3 * entry["epoch"]
    return [entry["epoch"] for entry in listed]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        pytest.param([1, 3, 2], {}, [2], id="best"),
        pytest.param([2, 1, 3], {"mode": "min"}, [2], id="min"),
        pytest.param([1, 4, 2, 3], {"keep_best": 3}, [2, 4, 3], id="best three"),
        pytest.param([4, 1, 3, 2], {"keep_best": 2, "mode": "min"}, [2, 4], id="least two"),
        pytest.param([1, 1, 1], {}, [1], id="tie: the earlier"),
        pytest.param([1, 2, 2, 1], {"keep_best": 2}, [2, 3], id="ties among two"),
        pytest.param([1, 2], {"keep_best": 0}, [], id="none"),
        pytest.param([1, 2], {"monitor": None}, [], id="no monitor"),
        pytest.param([NAN, 1, NAN, INF], {}, [2], id="not finite"),
        pytest.param([-0.5, -0.25], {}, [2], id="negative"),
        pytest.param([1, 2, 3], {"every_n_epochs": 3}, [3], id="best between saves"),
    ],
)
def test_best_are_kept(scores: list[float], options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    saver = run_scores(tmp_path, scores, **options)
    assert kept_epochs(tmp_path) == kept
    assert [entry["epoch"] for entry in saver.best] == kept
    assert files.load(tmp_path / LAST)["global_step"] == 3 * len(scores)


def test_no_score_from_an_epoch_without_one(tmp_path: Path) -> None:
    """Lightning goes on showing the latest value of a metric."""
    run_scores(tmp_path, [1, None, 2, None], keep_best=4)
    assert kept_epochs(tmp_path) == [3, 1]


def test_epochs_without_validation(tmp_path: Path) -> None:
    fit(tmp_path, Recorder(tmp_path, Checkpointing(keep_best=9)), epochs=4, val_every_n_epochs=2)
    assert sorted(kept_epochs(tmp_path)) == [2, 4]


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss", "train/acc1"])
def test_metrics_of_validation_and_training(monitor: str, tmp_path: Path) -> None:
    fit(tmp_path, Recorder(tmp_path, Checkpointing(monitor=monitor, mode="min")))
    assert len(kept_epochs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("monitor", "hint"), [("val/acc", "; did you mean val/acc1?"), ("val_ema/acc1", None), ("x", "")]
)
def test_unknown_monitor(monitor: str, hint: str | None, tmp_path: Path) -> None:
    with pytest.raises(UnknownMonitor) as caught:
        fit(tmp_path, Recorder(tmp_path, Checkpointing(monitor=monitor)), epochs=3)
    message = str(caught.value)
    if hint is not None:
        assert message.startswith(f"checkpointing.monitor={monitor}: no such metric is logged{hint} (")
    assert "val/loss" in message
    assert "\n" not in message
    # The epoch isn't lost: with the monitor put right, the run goes on after it.
    assert files.load(tmp_path / LAST)["global_step"] == 3


def test_unknown_monitor_is_the_users_mistake(tmp_path: Path) -> None:
    """It is reported before anything is built or written."""
    with pytest.raises(UserError, match=r"^checkpointing.monitor=val/acc_1: .*did you mean val/acc1\?"):
        train(compose(tmp_path, *SMALL, "checkpointing.monitor=val/acc_1"))
    assert list(tmp_path.iterdir()) == []


def test_monitors_are_the_metrics_that_a_run_logs(tmp_path: Path) -> None:
    explained = ("explanation=default", "explanation.gallery_images=0", "explanation.n_images=4", "dataset.size=32")
    config = compose(tmp_path, *SMALL, *explained, "trainer.gradient_clip_val=0.1", "trainer.max_epochs=1")
    assert train(config) == 0
    logged = {key for row in metric_rows(run_folder(tmp_path)) for key in row} - {"step", "epoch"} | {
        "images_per_second"
    }
    settings = TrainConfig(**instantiate(config))
    for monitor in sorted(logged):
        check_monitor(replace(settings, checkpointing=Checkpointing(monitor=monitor)))
    with pytest.raises(UserError) as caught:
        check_monitor(replace(settings, checkpointing=Checkpointing(monitor="?")))
    listed = str(caught.value).partition("(logged are ")[2].rstrip(")").replace(" and ", ", ").split(", ")
    percentiles = {f"explanation/grid_pointing/p{p}" for p in (25, 50, 75, 100)}  # not logged without grids
    assert set(listed) == percentiles | {key for key in logged if not key.startswith("explanation/alignment/")}


def test_explanation_monitor_may_wait_for_its_epoch(tmp_path: Path) -> None:
    class Explained(Quality):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                pl_module.log_now({"explanation/alignment": 0.5})

    options = Checkpointing(monitor="explanation/alignment")
    fit(tmp_path, Explained([]), Recorder(tmp_path, options), epochs=3)
    assert kept_epochs(tmp_path) == [3]
    with pytest.raises(UnknownMonitor):
        fit(tmp_path / "none", Recorder(tmp_path / "none", options), epochs=2)


# ---- when


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({}, [3, 6, 9, 12], id="each epoch"),
        pytest.param({"every_n_epochs": 2}, [6, 12], id="each second epoch"),
        pytest.param({"every_n_epochs": 9}, [12], id="the last epoch in any case"),
        pytest.param({"every_n_epochs": 9, "every_n_steps": 2}, [2, 4, 6, 8, 10, 12], id="steps, also at epoch ends"),
        pytest.param({"every_n_epochs": 9, "every_n_steps": 5}, [5, 10, 12], id="steps"),
    ],
)
def test_times_of_saving(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    saver = Recorder(tmp_path, Checkpointing(monitor=None, **options))
    fit(tmp_path, saver, epochs=4)
    assert saver.saved_at == steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_minutes(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one minute each optimizer step."""
    saver = Recorder(tmp_path, Checkpointing(monitor=None, every_n_epochs=9, every_n_minutes=2.5))
    data = make_data(accumulate=accumulate)
    module = make_module(data, epochs=4)

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return 60.0 * module.global_step if module._trainer is not None else 0.0

    monkeypatch.setattr(module_under_test, "time", Clock)
    fit(tmp_path, saver, data=data, module=module, epochs=4, accumulate=accumulate)
    assert saver.saved_at == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": -1}, "checkpointing.keep_best=-1: at least 0"),
        ({"every_n_epochs": 0}, "checkpointing.every_n_epochs=0: at least 1"),
        ({"every_n_steps": 0}, "checkpointing.every_n_steps=0: at least 1"),
        ({"every_n_minutes": 0}, "checkpointing.every_n_minutes=0: more than 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointing(**options)


# ---- going on


@pytest.mark.parametrize("missing", ["copy", "list"])
def test_killed_between_last_and_best(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``last.ckpt`` knows of a best one whose file, or whose entry in the list, was not written any more."""

    def die(*args: Any) -> None:
        if files.load(tmp_path / LAST)["global_step"] == 6:
            raise KeyError("killed")

    with monkeypatch.context() as patch:
        if missing == "copy":
            copy = files.copy
            patch.setattr(files, "copy", lambda *args: (die(), copy(*args)))
        else:
            patch.setattr(Recorder, "_write_best", die)
        with pytest.raises(KeyError, match="killed"):
            run_scores(tmp_path, [1, 2, 0])
    fit(tmp_path, Quality([1, 2, 0]), Recorder(tmp_path, Checkpointing(monitor="quality")),
        epochs=3, resume_from=tmp_path / LAST)  # fmt: skip
    assert kept_epochs(tmp_path) == [2]


def test_going_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    """The state of ``previous.ckpt`` names a best file that has been deleted since."""
    run_scores(tmp_path, [1, 2])
    assert kept_epochs(tmp_path) == [2]
    (tmp_path / LAST).unlink()
    fit(tmp_path, Quality([1, 2, 1]), Recorder(tmp_path, Checkpointing(monitor="quality")),
        epochs=3, resume_from=tmp_path / PREVIOUS)  # fmt: skip
    assert kept_epochs(tmp_path) == [2]


def test_changed_monitor_starts_a_list_of_its_own(tmp_path: Path) -> None:
    run_scores(tmp_path, [100, 50])
    saver = Recorder(tmp_path, Checkpointing(monitor="val/loss", mode="min"))
    fit(tmp_path, saver, epochs=3, resume_from=tmp_path / LAST)
    assert [entry["epoch"] for entry in saver.best] == [3]
    assert len(list(tmp_path.glob("epoch-*.ckpt"))) == 2, "what the other list kept stays"


def test_stop_flag_saves_and_leaves(tmp_path: Path) -> None:
    stop = StopFlag()
    saver = Recorder(tmp_path, Checkpointing(every_n_minutes=None), stop)

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 1:
                stop.signum = signal.SIGTERM

    with pytest.raises(Interrupted) as caught:
        fit(tmp_path, Ask(), saver)
    assert caught.value.exit_code == 143
    assert saver.saved_at == [2]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A step from infinite gradients of a finite loss."""

    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                with torch.no_grad():
                    pl_module.model.conv.linear.weight[0, 0, 0, 0] = INF

    saver = Recorder(tmp_path, Checkpointing(every_n_steps=1))
    with pytest.raises(NonFiniteLoss, match=r"weights are not finite \(conv\.linear\.weight\) after 5 optimizer steps"):
        fit(tmp_path, Spoil(), saver)
    assert saver.saved_at == [1, 2, 3, 4]


def test_a_disk_that_refuses_is_the_users_to_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 0

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code), "last.ckpt")

    for code, hint in (
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "make it accessible"),
        (errno.EIO, "check the disk or the network drive"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(files, "_dump", refuse)
            with pytest.raises(UserError) as caught:
                train(compose(tmp_path, *SMALL))
        assert f"{os.strerror(code)}: 'last.ckpt': {hint} and run the same command again" in str(caught.value)
    assert train(compose(tmp_path, *SMALL)) == 0


# ---- finding


def test_find_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(ValueError, match=r"no best checkpoint in .*; use checkpoint=last"):
        find_checkpoint(tmp_path, "best")
    run_scores(tmp_path, [1, 3, 2], keep_best=2)
    assert find_checkpoint(tmp_path, "last") == tmp_path / LAST
    best = find_checkpoint(tmp_path, "best")
    assert files.load(best)["global_step"] == 6
    assert find_checkpoint(tmp_path, str(best)) == best
    with pytest.raises(ValueError, match="checkpoint=bset: no such file; must be best, last or a path"):
        find_checkpoint(tmp_path, "bset")
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt is empty"):
        find_checkpoint(tmp_path, "last")
    best.unlink()
    with pytest.raises(ValueError, match=f"best checkpoint, {best.name}, is missing"):
        find_checkpoint(tmp_path, "best")


# ---- killed


def test_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """kill -9 of the real command at some step; the same command again, and nothing shows."""
    overrides = (
        *SMALL,
        "limit_train=40",
        "checkpointing.every_n_steps=1",
        "trainer.max_epochs=200",
        "model.backend=fused",
    )
    command = [sys.executable, "train.py", *overrides, f"runs={tmp_path / 'killed'}"]
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not any((tmp_path / "killed").rglob(PREVIOUS)):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    folder = run_folder(tmp_path / "killed")
    newest, _ = files.newest_valid(folder / "checkpoints")
    assert newest is not None
    reached = files.load(newest)["global_step"]
    assert 2 <= reached < 1000
    assert not (folder / "summary.json").exists()

    # What an uninterrupted run is like one epoch further on: both stop after the same step, from outside.
    stop_after = reached // 5 + 2
    for runs in ("killed", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            original = Classifier.on_train_epoch_start

            def on_train_epoch_start(self: Classifier, original: Any = original) -> None:
                if self.current_epoch == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                original(self)

            patch.setattr(Classifier, "on_train_epoch_start", on_train_epoch_start)
            assert train(compose(tmp_path / runs, *overrides)) == 143
    whole = run_folder(tmp_path / "whole")
    assert whole.name == folder.name
    ours, theirs = final_state(folder), final_state(whole)
    for key in ("model", "model_ema", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same_state(ours[key], theirs[key], key)
    assert metric_rows(folder) == metric_rows(whole)
