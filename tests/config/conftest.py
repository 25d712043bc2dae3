from pathlib import Path

import pytest
import toys

from bcos_train.config import targets


@pytest.fixture(autouse=True)
def toy_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs may name the toys and what the real list allows of torch."""
    monkeypatch.setattr(targets, "TARGETS", (*toys.TARGETS, *targets.TARGETS))
    toys.CALLS.clear()


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return toys.write_configs(tmp_path / "configs")
