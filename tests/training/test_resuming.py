"""What a run refuses to resume from, what it falls back to, and data that changed since the last checkpoint."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import CHECKPOINTS, LAST, PREVIOUS

from .runs import assert_same_state, compose, final_state, run_folder, signal_at

SETTINGS = (
    "dataset=imagefolder",
    "augmentation=plain",
    "explanation=none",
    "batch_size=3",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "num_workers=0",
    "schedule.warmup_epochs=0",
)


def write_images(root: Path, start: int = 0, stop: int = 6) -> None:
    """Write images ``start`` … ``stop`` of two classes for training, and one of each for validation."""
    for label, name in enumerate(("cat", "cow")):
        for part, numbers in (("train", range(start, stop)), ("val", range(1))):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in numbers:
                Image.new("RGB", (16, 16), (100 * label, 9 * i, 0)).save(root / part / name / f"{i}.png")


def mistake(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / CHECKPOINTS).iterdir()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of a run that was stopped after steps 1 and 2 of 2 x 4; the run folders are in runs/."""
    folder = tmp_path_factory.mktemp("stopped")
    write_images(folder / "images")
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, 0)
            assert train(config(folder)) == 128 + signal.SIGTERM
    return folder


def config(folder: Path, resume: object = True) -> dict[str, Any]:
    # The folder of the images belongs to the run's hash.
    root = folder.parent / "stopped0" / "images"
    return {**compose(folder / "runs", *SETTINGS, f"dataset.root={root}"), "resume": resume}


@pytest.fixture
def run(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stopped run: its folder."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(stopped / "runs", folder / "runs")
    return folder


def test_images_added_between_stop_and_resume(stopped: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(run, run.with_name(f"{run.name}-other"))
    before = contents(run_folder(run))
    write_images(stopped / "images", 6, 8)  # 16 images: 6 steps per epoch instead of 4
    try:
        assert mistake(config(run)).startswith(
            "dataset: the images changed since the last checkpoint: 16 instead of 12 training images; restore them, "
            "use resume=data_changed "
        )
        assert contents(run_folder(run)) == before
        with monkeypatch.context() as patch:
            signal_at(patch, 1)
            assert train(config(run, "data_changed")) == 128 + signal.SIGTERM
        assert final_state(run_folder(run))["position"] == {"epoch": 0, "step": 4, "steps_per_epoch": 6}
        assert train(config(run)) == 0  # from here on, they are the images of the run
        assert train(config(other, "data_changed")) == 0
        ours, theirs = final_state(run_folder(run)), final_state(run_folder(other))
        assert ours["global_step"] == 12
        assert_same_state(ours["model"], theirs["model"])
    finally:
        for path in (stopped / "images" / "train").glob("*/[67].png"):
            path.unlink()


def test_another_number_of_batches_per_step(run: Path) -> None:
    """The devices or their memory changed, and with them the number of batches in which a step is taken."""
    other = shutil.copytree(run, run.with_name(f"{run.name}-other"))
    for folder, limit in ((run, 1), (other, None)):
        settings = config(folder)
        settings["trainer"]["max_batch_per_device"] = limit
        assert train(settings) == 0
    one_by_one, together = final_state(run_folder(run)), final_state(run_folder(other))
    assert one_by_one["global_step"] == together["global_step"] == 8
    assert one_by_one["position"] == together["position"]
    assert int(one_by_one["train_score"]["count"]) == int(together["train_score"]["count"])


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


def change_shape(content: dict[str, Any]) -> None:
    content["model"]["conv1.linear.weight"] = torch.zeros(1)


def change_shape_of_state(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1)


FOREIGN: dict[str, tuple[Any, str]] = {
    "shape": (change_shape, r"its model doesn't fit the model: "),
    "no optimizer": (drop("optimizer_states"), "it has no optimizer_states"),
    "empty optimizer": (lambda content: content["optimizer_states"].clear(), "it has no optimizer state"),
    "optimizer without state": (
        lambda content: content["optimizer_states"][0]["state"].clear(),
        "it has no optimizer state",
    ),
    "shape of the state": (change_shape_of_state, r"exp_avg of parameter 0 has the shape \(1,\), the parameter"),
    "position": (lambda content: content["position"].update(step=3), "its position contradicts itself: epoch 0, 2 and"),
    "position elsewhere": (lambda content: content.update(global_step=5), "its position contradicts itself"),
    "position is a text": (lambda content: content.update(position="x"), "its content has another form"),
    "epoch": (lambda content: content.update(epoch=1), "its position contradicts itself"),
    "length": (lambda content: content["position"].update(steps_per_epoch=5), "an epoch has 5 optimizer steps there"),
    "no loops": (drop("loops"), "it has no loops"),
    "best": (
        lambda content: content["callbacks"]["Checkpointer"].update(best=[{"file": "../x"}]),
        "'../x' is not the name of a checkpoint of this run",
    ),
    "a list": (None, "it holds a list"),
}


def replace(path: Path, change: Callable[[dict[str, Any]], object] | None) -> None:
    """Write a checkpoint with a valid checksum."""
    content = files.load(path)
    if change is None:
        torch.save([1], path)
        files.digest_path(path).write_text(f"{files.file_sha256(path)}  {path.name}\n")
        return
    change(content)
    folder = path.parent / "new"
    files.save(content, folder / path.name)
    for name in (path.name, f"{path.name}.sha256"):
        (folder / name).replace(path.parent / name)
    folder.rmdir()


@pytest.mark.parametrize("name", FOREIGN)
def test_intact_checkpoints_of_something_else(name: str, run: Path) -> None:
    folder = run_folder(run)
    for path in (folder / CHECKPOINTS / LAST, folder / CHECKPOINTS / PREVIOUS):
        replace(path, FOREIGN[name][0])
    before = contents(folder)
    message = mistake(config(run))
    assert "weights_only" not in message
    assert re.search(FOREIGN[name][1], message), message
    assert contents(folder) == before


def test_falls_back_to_the_previous_one_and_overwrites_nothing(
    stopped: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(run)
    last = folder / CHECKPOINTS / LAST
    replace(last, change_shape)
    foreign = last.read_bytes()
    assert train(config(run)) == 0
    assert f"skipped: {last} is not a checkpoint of this run: its model doesn't fit" in capsys.readouterr().out
    assert last.with_name(f"{LAST}.unverified-1").read_bytes() == foreign
    other = run.with_name(f"{run.name}-other")
    shutil.copytree(stopped / "runs", other / "runs")
    assert train(config(other)) == 0
    assert_same_state(final_state(folder)["model"], final_state(run_folder(other))["model"])


def test_results_of_a_finished_run_are_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(run)) == 0
    folder = run_folder(run)
    weights, summary = folder / "model.safetensors", folder / "summary.json"
    good = weights.read_bytes(), json.loads(summary.read_text())
    texts = (b"", b"{}", b"{", b"[" * 10**5)
    flipped = good[0][:-1] + bytes([good[0][-1] ^ 1])
    damaged = ((weights, None), (weights, good[0][:-1]), (weights, flipped), *((summary, text) for text in texts))
    for path, content in damaged:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert train(config(run)) == 0
        after = json.loads(summary.read_text())
        seconds = {"seconds_since_start_or_resume": 0}
        assert (weights.read_bytes(), after | seconds) == (good[0], good[1] | seconds)
    capsys.readouterr()
    shutil.rmtree(folder / CHECKPOINTS)
    assert train(config(run)) == 0
    assert "already finished" in capsys.readouterr().out
    weights.unlink()
    assert "is finished, but model.safetensors is missing, and there is no checkpoint" in mistake(config(run))
    assert not weights.exists()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_out_of_range(seed: int, tmp_path: Path) -> None:
    settings = {**compose(tmp_path, *SETTINGS, "dataset=digits"), "seed": seed}
    assert mistake(settings) == f"seed={seed}: must lie between 0 and 4294967295"
