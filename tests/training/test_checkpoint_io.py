from pathlib import Path

import torch

from bcos_train.runs.checkpoint import LAST
from bcos_train.training.checkpoint_io import VerifiedCheckpointIO

from .runs import assert_same_state


def test_lightnings_door(tmp_path: Path) -> None:
    door, content = VerifiedCheckpointIO(), {"n": 1, "tensor": torch.arange(3.0)}
    door.save_checkpoint(content, str(tmp_path / LAST))
    assert_same_state(door.load_checkpoint(str(tmp_path / LAST)), content)
    door.remove_checkpoint(str(tmp_path / LAST))
    assert not list(tmp_path.iterdir())
