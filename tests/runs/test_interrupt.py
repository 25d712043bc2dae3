"""Graceful stop: a run saves at the end of a batch, exits with the right code, and resumes exactly."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.runs import TINY, assert_same_state, compose, final_state, metric_rows, run_folder, signal_at

from bcos_train.dataset.data_module import DataModule
from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.interrupt import StopFlag
from bcos_train.runs.launch import SIGNALS
from bcos_train.training import Classifier

SMALL = (*TINY, "limit_train=24", "limit_val=17")
STEPS = 3  # an epoch


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert train(compose(runs, *SMALL)) == 0
    return run_folder(runs)


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Any:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def assert_resumes(runs: Path, uninterrupted: Path) -> None:
    assert train(compose(runs, *SMALL)) == 0
    folder = run_folder(runs)
    ours, theirs = final_state(folder), final_state(uninterrupted)
    for key in ("model", "model_ema", "optimizer_states", "global_step", "epoch"):
        assert_same_state(ours[key], theirs[key], key)
    assert metric_rows(folder) == metric_rows(uninterrupted)


def steps_saved(runs: Path) -> int:
    return final_state(run_folder(runs))["global_step"]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), *((s, 128 + s) for s in SIGNALS[2:])],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_exit_codes(
    signum: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    previous = signal.signal(signum, signal.default_int_handler)  # under nohup, SIGHUP would be ignored
    try:
        signal_at(monkeypatch, 1, signum)
        assert train(compose(tmp_path, *SMALL)) == code
    finally:
        signal.signal(signum, previous)
    assert steps_saved(tmp_path) == 2, "the batch was finished, and no other begun"
    name = signal.Signals(signum).name
    assert f"{name}: saving after this step, then stopping (Ctrl-C again stops immediately)" in capfd.readouterr().err


def in_validation(patch: pytest.MonkeyPatch) -> None:
    original = Classifier.validation_step

    def validation_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            send()
        return original(self, batch, batch_idx)

    patch.setattr(Classifier, "validation_step", validation_step)


def in_last_batch(patch: pytest.MonkeyPatch) -> None:
    signal_at(patch, STEPS - 1)


def in_setup(patch: pytest.MonkeyPatch) -> None:
    """After Lightning has installed its handlers, before the first batch."""
    original = DataModule.train_dataloader
    patch.setattr(DataModule, "train_dataloader", lambda self: (send(), original(self))[1])


def before_the_model_is_built(patch: pytest.MonkeyPatch) -> None:
    original = DataModule.setup
    patch.setattr(DataModule, "setup", lambda self, stage=None: (send(), original(self, stage))[1])


def while_saving(patch: pytest.MonkeyPatch) -> None:
    original = files.file_sha256
    patch.setattr(files, "file_sha256", lambda path: (send(), original(path))[1])


@pytest.mark.parametrize(
    ("moment", "steps", "when"),
    [
        pytest.param(in_last_batch, STEPS, "the end of this epoch", id="in the last batch: saved after the epoch"),
        pytest.param(in_validation, STEPS, "this validation", id="in validation: saved after the epoch"),
        pytest.param(in_setup, 1, "the first step", id="while setting up"),
        pytest.param(before_the_model_is_built, 1, "the first step", id="before the model is built"),
        pytest.param(while_saving, STEPS + 1, "the next step", id="while saving: after the next step"),
    ],
)
def test_moments(
    moment: Callable[[pytest.MonkeyPatch], None],
    steps: int,
    when: str,
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        moment(patch)
        assert train(compose(tmp_path, *SMALL)) == 143
    assert f"SIGTERM: saving after {when}, then stopping (" in capfd.readouterr().err
    assert steps_saved(tmp_path) == steps
    assert_resumes(tmp_path, uninterrupted)


def test_a_signal_after_the_last_epoch_does_not_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        while_saving(patch)
        assert train(compose(tmp_path, *SMALL, "trainer.max_epochs=1", "checkpointing.every_n_minutes=null")) == 0
    assert "SIGTERM: all epochs are done, finishing (" in capfd.readouterr().err


def test_second_ctrl_c_stops_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def training_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        send(signal.SIGINT)
        seen.append("once")
        send(signal.SIGINT)
        seen.append("twice")

    monkeypatch.setattr(Classifier, "training_step", training_step)
    assert train(compose(tmp_path, *SMALL)) == 130
    assert seen == ["once"]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_second_other_signal_waits_for_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends the requested signal before the time limit, and SIGTERM later."""
    original = Classifier.training_step

    def training_step(self: Classifier, *args: Any) -> Any:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    assert train(compose(tmp_path, *SMALL)) == 143
    assert steps_saved(tmp_path) == 1


def test_keyboard_interrupt_without_a_stop_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other KeyboardInterrupts are not swallowed."""

    def training_step(self: Classifier, *args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "training_step", training_step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(compose(tmp_path, *SMALL))


def test_stop_flag() -> None:
    stop = StopFlag()
    with stop.handling_signals():
        assert stop.signum is None
        send(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopFlag().handling_signals():
        raise ZeroDivisionError


def test_closed_stderr_is_no_reason_to_fail(tmp_path: Path) -> None:
    """As after the run's terminal was closed."""
    stop = StopFlag()
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 2)
        with stop.handling_signals():
            send(signal.SIGTERM)
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, writer):
            os.close(descriptor)
    assert stop.signum == signal.SIGTERM
