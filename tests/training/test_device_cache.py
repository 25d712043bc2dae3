"""Runs on a cached data set equal those without the cache bit for bit, wherever they are stopped."""

import signal
from pathlib import Path

import pytest

from bcos_train.config import UserError
from bcos_train.dataset import device_cache
from bcos_train.run import train

from .runs import TINY, compose, final_state, metric_rows, run_folder, signal_at
from .test_ddp import SELF_START, SMALL, start
from .test_resume import assert_same_run

CROP_FLIP = ("augmentation=crop_flip", "augmentation.train.size=16", "augmentation.train.padding=2")
CACHED = "dataset.cache=device"


@pytest.fixture(scope="module")
def without_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("without")
    assert train(compose(runs, *TINY, *CROP_FLIP)) == 0
    return run_folder(runs)


@pytest.mark.parametrize("workers", [0, 2])
def test_same_run(workers: int, without_cache: Path, tmp_path: Path) -> None:
    assert train(compose(tmp_path, *TINY, *CROP_FLIP, CACHED, f"num_workers={workers}")) == 0
    assert run_folder(tmp_path).name == without_cache.name
    assert_same_run(run_folder(tmp_path), without_cache)


@pytest.mark.parametrize("batch", [0, 3, 4, 6])
def test_resume_with_and_without_the_cache(
    batch: int, without_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*TINY, *CROP_FLIP)
    for extra, at in ((CACHED, batch), ("dataset.cache=null", 0), (CACHED, 0)):
        with monkeypatch.context() as patch:
            signal_at(patch, at)
            assert train(compose(tmp_path, *overrides, extra)) == 128 + signal.SIGTERM
    assert train(compose(tmp_path, *overrides, CACHED)) == 0
    assert_same_run(run_folder(tmp_path), without_cache)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    overrides = (*SMALL, *CROP_FLIP)
    for name, extra in (("without", "dataset.cache=null"), ("cached", CACHED)):
        result = start(
            SELF_START,
            *[f"++{text}" if "." in text.partition("=")[0] else text for text in overrides],
            f"++{extra}",
            f"runs={tmp_path / name}",
        )
        assert result.returncode == 0, result.stderr[-3000:]
    without, cached = run_folder(tmp_path / "without"), run_folder(tmp_path / "cached")
    assert without.name == cached.name
    assert metric_rows(cached) == metric_rows(without)
    for key, value in final_state(without)["model"].items():
        assert value.equal(final_state(cached)["model"][key]), key


def test_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^dataset: cache=device: RandomAffine\(.*\) in augmentation.train isn't"
    ) as caught:
        train(compose(tmp_path, *TINY, CACHED))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(device_cache, "_free_memory", lambda device: 0)
    with pytest.raises(
        UserError, match=r"^dataset: cache=device: digits \(.*\) needs 0\.0 GiB, 0\.0 GiB are free on cpu"
    ):
        train(compose(tmp_path, *TINY, *CROP_FLIP, CACHED))
