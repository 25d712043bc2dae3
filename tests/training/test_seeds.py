"""Seeds of a step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bcos_train.dataset.randomness import step_seed
from bcos_train.training.module import _seed

from .toys import TinyNet, fit, make_data, make_module


def test_steps_are_seeded_as_by_torch(tmp_path: Path) -> None:
    data, drawn = make_data(), []

    class Random(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                drawn.append(torch.rand(3))
            return super().forward(x)

    module = make_module(data, Random(), seed=5)
    fit(tmp_path, data=data, module=module)
    for step, values in enumerate(drawn):
        torch.manual_seed(step_seed(5, step, 0))
        assert torch.equal(values, torch.rand(3))


def test_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append(("cuda", seed)))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: seeded.append(("mps", seed)))
    for device, expected in (("cpu", []), ("cuda", [("cuda", 7)])):
        _seed(7, torch.device(device))
        assert seeded == expected
