"""A validation epoch caches the weights once."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training.toys import TinyNet, fit, make_data, make_module

from bcos_train.nn.fast.dispatch import CACHE


class Evaluated(TinyNet):
    """Records the conditions of each call; fails in validation if asked to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.seen = fails, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        cached = CACHE.weights.get(self.conv.linear)
        self.seen.append((self.training, torch.backends.cudnn.allow_tf32, None if cached is None else id(cached)))
        if self.fails and not self.training:
            raise ZeroDivisionError
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_validation_caches_weights_once_an_epoch_and_never_uses_tf32(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    data, model = make_data(), Evaluated(fails)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        fit(tmp_path, data=data, module=make_module(data, model))
    assert torch.backends.cudnn.allow_tf32
    assert model.conv.linear not in CACHE.weights
    for training, tf32, cached in model.seen:
        assert tf32 == training
        assert (cached is None) == training
    cached = [cached for training, _, cached in model.seen if not training]
    assert len(cached) == (1 if fails else 4)
    if not fails:
        assert cached[0] == cached[1]
        assert cached[2] == cached[3]
