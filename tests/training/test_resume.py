"""A run that was stopped anywhere goes on bit for bit."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from bcos_train.run import train
from bcos_train.runs.layout import LAST

from .runs import TINY, assert_same_state, compose, final_state, metric_rows, run_folder, signal_at

BATCHES = 10  # 2 epochs x 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert train(compose(runs, *TINY)) == 0
    return run_folder(runs)


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = final_state(folder), final_state(reference)
    for key in ("model", "model_ema", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same_state(ours[key], theirs[key], key)
    assert metric_rows(folder) == metric_rows(reference)
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", range(BATCHES))
def test_stop_in_any_batch(
    batch: int, workers: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(tmp_path, *TINY, f"num_workers={workers}")
    with monkeypatch.context() as patch:
        signal_at(patch, batch)
        # With all epochs done there is nothing left to stop.
        assert train(config) == (0 if batch == BATCHES - 1 else 128 + signal.SIGTERM)
    # Written with some workers, resumed with others.
    assert train(compose(tmp_path, *TINY, f"num_workers={2 - workers}")) == 0
    assert_same_run(run_folder(tmp_path), uninterrupted)


def test_stop_in_every_batch(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(tmp_path, *TINY)
    codes = []
    while 0 not in codes:
        with monkeypatch.context() as patch:
            signal_at(patch, 0)
            codes.append(train(config))
        assert len(codes) <= BATCHES + 1
    assert_same_run(run_folder(tmp_path), uninterrupted)


def test_finished_run_is_left_alone(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = uninterrupted.parents[2]
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert train(compose(runs, *TINY)) == 0
    assert "already finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_resume_false_takes_a_new_folder(uninterrupted: Path) -> None:
    runs = uninterrupted.parents[2]
    assert train(compose(runs, *TINY, "resume=false", "trainer.max_epochs=2")) == 0
    second = uninterrupted.with_name(f"{uninterrupted.name}-2")
    assert_same_run(second, uninterrupted)


def test_damaged_checkpoint_is_passed_over(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(tmp_path, *TINY)
    for batch in (2, 2):  # the second stop makes the first one's checkpoint `previous.ckpt`
        with monkeypatch.context() as patch:
            signal_at(patch, batch)
            train(config)
    last = run_folder(tmp_path) / "checkpoints" / LAST
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert train(config) == 0
    assert "damaged" in capsys.readouterr().out
    assert_same_run(run_folder(tmp_path), uninterrupted)


def test_accumulation_resumes_at_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (*TINY, "trainer.max_batch_per_device=4")
    assert train(compose(tmp_path / "a", *overrides)) == 0
    config: dict[str, Any] = compose(tmp_path / "b", *overrides)
    with monkeypatch.context() as patch:
        signal_at(patch, 6)  # the first half of the fourth step
        assert train(config) == 128 + signal.SIGTERM
    assert final_state(run_folder(tmp_path / "b"))["global_step"] == 4
    assert train(config) == 0
    assert_same_run(run_folder(tmp_path / "b"), run_folder(tmp_path / "a"))


@pytest.mark.parametrize("damage", ["empty", "a folder"])
def test_damaged_metrics_do_not_keep_a_run_from_ending(damage: str, tmp_path: Path) -> None:
    config = compose(tmp_path, *TINY)
    train(config)
    folder = run_folder(tmp_path)
    (folder / "summary.json").unlink()
    (folder / "metrics.csv").unlink()
    if damage == "empty":
        (folder / "metrics.csv").touch()
    else:
        (folder / "metrics.csv").mkdir()
    assert train(config) == 0
    assert (folder / "summary.json").exists()


def test_killed_between_the_last_checkpoint_and_the_summary(uninterrupted: Path, tmp_path: Path) -> None:
    config = compose(tmp_path, *TINY)
    train(config)
    folder = run_folder(tmp_path)
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    (folder / "model.safetensors").unlink()
    assert train(config) == 0
    assert_same_run(folder, uninterrupted)
    before, after = json.loads(summary), json.loads((folder / "summary.json").read_text())
    assert {**before, "seconds_since_start_or_resume": 0} == {**after, "seconds_since_start_or_resume": 0}
