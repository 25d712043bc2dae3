from collections.abc import Iterator
from pathlib import Path

import pytest

from .release import Release, serving, use


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Release]:
    """A fake release, in use, with the cache under ``tmp_path / "home"``."""
    with serving(Release()) as served:
        use(monkeypatch, served.address, tmp_path / "home")
        yield served


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with averaged weights; not to be written into."""
    from training.runs import compose, run_folder

    from bcos_train.run import train

    small = ("model=resnet20", "dataset.size=16", "limit_train=8", "limit_val=8", "batch_size=4", "num_workers=0")
    quiet = ("trainer.accelerator=cpu", "trainer.progress=false", "explanation=none", "trainer.max_epochs=1")
    average = "ema={_target_: bcos_train.training.Ema, decay: 0.99, every_n_steps: 1}"
    runs = tmp_path_factory.mktemp("runs")
    assert train(compose(runs, *small, *quiet, average, "model.b=1.5", "optimizer.lr=0.01")) == 0
    return run_folder(runs)
