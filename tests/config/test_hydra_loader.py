"""What files may set under ``hydra`` is tested in ``tests/faults/test_hostile_configs.py``."""

from pathlib import Path

import pytest
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from bcos_train.config.hydra_loader import HydraLoader


def test_launchers_can_write_into_the_config(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "train.yaml").write_text("hydra: {sweep: {dir: sweeps}}")
    loader = HydraLoader(create_config_search_path(str(tmp_path)), tmp_path)
    config = loader.load_configuration("train", ["hydra/launcher=submitit_local"], RunMode.MULTIRUN)
    assert not OmegaConf.is_readonly(config.hydra.job)
