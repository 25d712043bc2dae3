"""Lightning's way to our checkpoint files."""

from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from bcos_train.runs import checkpoint as files


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's door to the checkpoint files of :mod:`bcos_train.runs.checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        files.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: Any = None) -> dict[str, Any]:
        return files.load(Path(path), map_location="cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        files.delete(Path(path))
