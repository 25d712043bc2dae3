"""Compiled training steps."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.training.logging import read_metrics

from .runs import TINY, compose
from .toys import TinyNet, fit, make_data, make_module

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="needs a C++ compiler"
)


@needs_compiler
def test_same_steps(tmp_path: Path) -> None:
    rows, states = [], []
    for compiled in (False, True):
        data = make_data()
        torch.manual_seed(0)
        module = make_module(data, TinyNet(), compiled=compiled)
        expected_keys = set(module.state_dict())
        fit(tmp_path / str(compiled), data=data, module=module)
        assert set(module.state_dict()) == expected_keys
        assert (module._apply_model != module._run_model) == compiled
        rows.append(read_metrics(tmp_path / str(compiled) / "metrics.csv"))
        states.append(module.model.state_dict())
    for a, b in zip(*rows, strict=True):
        assert b["train/loss_step"] == pytest.approx(a["train/loss_step"], rel=1e-4)
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, rtol=1e-3, atol=1e-4), key


@needs_compiler
def test_cache_outlives_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bcos_train.training import TrainerOptions
    from bcos_train.training.build import build_trainer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what was there comes back
    for given, expected in ((None, str(tmp_path / "bcos-train" / "inductor")), ("/elsewhere", "/elsewhere")):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if given is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        build_trainer(TrainerOptions(max_epochs=1, accelerator="cpu", compile=True))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"trainer\.compile=true needs a C\+\+ compiler, and there is no g\+\+ or clang\+\+"
    ):
        train(compose(tmp_path / "runs", *TINY, "trainer.compile=true"))
