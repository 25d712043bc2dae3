"""Figures, explanation metrics and loggers may fail with a warning, never the training; the checkpoint comes first."""

import logging
from pathlib import Path

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.runs.layout import LAST, SUMMARY
from bcos_train.training.callbacks import explanations
from bcos_train.training.side_matters import protect

from .runs import TINY, compose, run_folder

SMALL = (*(text for text in TINY if text != "explanation=none"), "limit_train=16", "limit_val=9")
SMALL = (*SMALL, "trainer.max_epochs=1", "explanation.gallery_images=2", "explanation.n_images=2")


def test_the_training_ends_well_and_saves_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved_before = []

    def draw(*args: object, **kwargs: object) -> None:
        saved_before.append((run_folder(tmp_path) / "checkpoints" / LAST).exists())
        raise RuntimeError("[/b]\x1b[2J no\nfigure")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no metrics")

    monkeypatch.setattr(explanations, "draw_gallery", draw)
    monkeypatch.setattr(explanations, "measure", fail)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fail)
    assert train(compose(tmp_path, *SMALL, "logger=tensorboard")) == 0
    assert saved_before == [True]
    assert (run_folder(tmp_path) / SUMMARY).exists()
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("bcos_train")]
    assert sorted(texts) == [
        "TensorBoardLogger, which logs nothing more, failed, the training continues: RuntimeError: no metrics",
        "explanation metrics failed, the training continues: RuntimeError: no metrics",
        "gallery failed, the training continues: RuntimeError: [/b]\\x1b[2J no figure",
    ]


def test_signals_are_not_side_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    monkeypatch.setattr(logger, "log_metrics", lambda metrics: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        protect(logger).log_metrics({})


def test_a_failed_logger_is_called_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(metrics: dict[str, float]) -> None:
        calls.append(metrics)
        raise BrokenPipeError

    logger = TensorBoardLogger(str(tmp_path))
    monkeypatch.setattr(logger, "log_metrics", fail)
    protect(logger)
    logging.getLogger("bcos_train").setLevel(logging.NOTSET)
    logger.log_metrics({"a": 1.0})
    logger.log_metrics({"a": 2.0})
    logger.save()
    assert calls == [{"a": 1.0}]


@pytest.mark.parametrize("part", ["dataset", "augmentation"])
def test_sizes_that_exhaust_the_memory(part: str, tmp_path: Path) -> None:
    config = compose(tmp_path, *SMALL)
    if part == "dataset":
        config["dataset"]["size"] = 100_000
    else:
        config["augmentation"]["eval"] = {"_target_": "bcos_train.augmentation.plain", "size": 100_000}
    with pytest.raises(UserError, match=r"size must lie between 1 and 4,096 pixels, not 100,000"):
        train(config)
    assert list(tmp_path.iterdir()) == []
