import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys
from hydra.core.config_store import ConfigStore

from bcos_train.config import plugins, targets


@pytest.fixture(autouse=True)
def toy_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs may name the toys and what the real list allows of torch."""
    monkeypatch.setattr(targets, "TARGETS", (*toys.TARGETS, *targets.TARGETS))
    monkeypatch.setattr(plugins, "REGISTERED", targets.REGISTERED.copy())
    monkeypatch.setattr(targets, "REGISTERED", plugins.REGISTERED)
    # Without the models of the project's configs, which are stored for the whole process.
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {group: node for group, node in store.repo.items() if group != "model"})
    toys.CALLS.clear()


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return toys.write_configs(tmp_path / "configs")


@pytest.fixture
def command(
    configs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[toys.Command]:
    (configs.parent / "work").mkdir()
    monkeypatch.chdir(configs.parent / "work")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield toys.Command(configs, monkeypatch, capsys)
    # --info sets up logging.
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
