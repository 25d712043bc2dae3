"""Counts how often a training step reads a tensor: on a GPU each time is a wait for all that has been queued."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations whose result depends on values: `.item()`, `bool()`, `float()`, masks as indices, ….
READING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim"}


class ReadsPerStep(TorchDispatchMode, pl.Callback):
    """``counts`` has the reads from each batch's start to the next one's in the same epoch."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.counts: list[int] = []
        self.names: list[str] = []
        self._is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 else [])
            if isinstance(args[1], list | tuple)
        )
        if name in READING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """On the CPU these read the memory itself, and are no operations."""

        def noting(name: str, original: Any) -> Any:
            def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.names.append(name)
                return original(tensor, *args, **kwargs)

            return method

        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(Tensor, name, noting(name, getattr(Tensor, name)))
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        if on != self._is_on:
            self._is_on = on
            if on:
                self.__enter__()
            else:
                self.__exit__(None, None, None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index > 0:
            self.counts.append(len(self.names))
        self.names.clear()
        self._switch(index + 1 < trainer.num_training_batches)
