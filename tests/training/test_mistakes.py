"""Mistakes that only show while a run is put together: one line each, and nothing is left behind."""

import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from bcos_train import run
from bcos_train.config import UserError, check
from bcos_train.config.composition import Composer
from bcos_train.config.overrides import read_overrides
from bcos_train.optimizer import timm_optimizer
from bcos_train.run import train
from bcos_train.runs.hash import run_hash
from bcos_train.training.build import check_optimizer
from bcos_train.training.config import TrainConfig

from .runs import CONFIGS, TINY, compose, final_state, run_folder, signal_at


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", r"^optimizer\.lr=-1\.0: Invalid learning rate: -1\.0$"),
        ("optimizer.weight_decay=-1", r"^optimizer\.weight_decay=-1\.0: Invalid weight_decay value: -1"),
        ("optimizer.betas=[2,0.9]", r"^optimizer\.betas=\[2, 0\.9\]: Invalid beta parameter at index 0: 2"),
        (
            "model.in_chans=3",
            "model.in_chans=3: the encoding has 6 channels, r g b 1-r 1-g 1-b",
        ),
        ("model.b=0.5", "model: .*0.5"),
        ("name=a/b", "name=a/b: expected a prefix"),
        ("name=''", "name=: expected a prefix"),
        ("dataset.val_fraction=0.999", "dataset: digits has no training images"),
    ],
)
def test_one_line_and_no_run_folder(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(compose(tmp_path, *TINY, override))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_optimizer_is_checked_before_other_processes_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(run, "_restart")
    message = r"^optimizer\.momentum=-1\.0: Invalid momentum value: -1\.0$"
    with pytest.raises(UserError, match=message):
        train(compose(tmp_path, *TINY, "optimizer=sgd", "optimizer.momentum=-1", "trainer.devices=2"))


def test_two_wrong_values_of_the_optimizer() -> None:
    with pytest.raises(UserError, match=r"^optimizer: Invalid learning rate: -1$"):
        check_optimizer(partial(torch.optim.SGD, lr=-1, momentum=-1))


def test_a_name_that_timm_does_not_have() -> None:
    with pytest.raises(UserError, match=r"^optimizer\.name=lam: timm has no such optimizer; did you mean lamb"):
        check_optimizer(partial(timm_optimizer, name="lam", lr=0.1))


@pytest.mark.parametrize(
    ("main", "override", "key"),
    [
        ("train", "arch=resnet50", "model"),
        ("train", "gpus=2", "trainer.devices"),
        ("train", "fp16=true", "trainer.precision"),
        ("train", "pretrained=true", "model.pretrained"),
        ("evaluate", "pretrained=true", "weights"),
    ],
)
def test_keys_of_other_programs(main: str, override: str, key: str) -> None:
    composer = Composer(CONFIGS)
    config = composer.defaults(main)
    _, (problem,) = read_overrides([override], composer, config, lambda: config)
    assert str(problem) == f"{override.partition('=')[0]}: unknown key or config group; did you mean {key}?"


def test_a_single_class(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / part / "cat" / "0.png")
    overrides = ("dataset=imagefolder", f"dataset.root={tmp_path}", "augmentation=plain", "trainer.accelerator=cpu")
    with pytest.raises(UserError, match="dataset: cat is the only class; a classifier needs at least two"):
        train(compose(tmp_path / "runs", *overrides))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image(workers: int, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / part / name / "0.png")
    bad = tmp_path / "train" / "a" / "1.jpg"
    bad.write_text("no image")
    overrides = (
        "dataset=imagefolder",
        f"dataset.root={tmp_path}",
        "dataset.max_skipped=0",
        "model.num_classes=2",
        "augmentation=plain",
        "batch_size=2",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        f"num_workers={workers}",
    )
    with pytest.raises(UserError) as caught:
        train(compose(tmp_path / "runs", *overrides))
    assert str(caught.value).startswith(f"cannot read the image {bad}")
    assert "\n" not in str(caught.value)


def test_whole_numbers_pass_for_floats(tmp_path: Path) -> None:
    a = compose(tmp_path, *TINY, "augmentation.cutmix_alpha=1", "optimizer.weight_decay=0")
    b = compose(tmp_path, *TINY, "augmentation.cutmix_alpha=1.0", "optimizer.weight_decay=0.0")
    assert run_hash(a) == run_hash(b)
    assert train({**a, "limit_train": 8, "limit_val": 8}) == 0


def test_a_run_in_a_further_folder_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(tmp_path, *TINY, "resume=false")
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        assert train(config) == 128 + signal.SIGTERM
    folder = run_folder(tmp_path)
    assert train(config, folder) == 0
    assert run_folder(tmp_path) == folder
    assert final_state(folder)["global_step"] == 10


def test_a_single_image_in_the_last_batch(tmp_path: Path) -> None:
    """Centered norms need two values per channel."""
    overrides = (*TINY, "model=standard_resnet18", "limit_train=9", "limit_val=4", "trainer.max_epochs=1")
    settings = compose(tmp_path, *(text for text in overrides if not text.startswith("model.")))
    with pytest.raises(UserError, match=r"batch_size=8: of 9 training images .* 1 per device, .*drop_last=true") as e:
        train(settings)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
    assert train({**settings, "drop_last": True}) == 0
    assert final_state(run_folder(tmp_path))["global_step"] == 1
    with pytest.raises(UserError, match="7 training images are fewer than batch_size=8: drop_last=false"):
        train({**settings, "limit_train": 7, "drop_last": True})


def test_a_float_is_no_precision(tmp_path: Path) -> None:
    (problem,) = check(compose(tmp_path, "trainer.precision=16.0"), root=TrainConfig)
    assert str(problem) == "trainer.precision=16.0: expected 32, 16 or bf16; did you mean 16?"


def test_a_class_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"^dataset: .*Permission denied: .*val") as caught:
        train(compose(tmp_path / "runs", "dataset=imagefolder", f"dataset.root={tmp_path}", "trainer.accelerator=cpu"))
    assert "\n" not in str(caught.value)
