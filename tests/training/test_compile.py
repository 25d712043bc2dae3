"""Compiled training steps."""

import shutil
from pathlib import Path

import pytest
import torch

from bcos_train.config import UserError
from bcos_train.run import train
from bcos_train.runs.layout import read_metrics
from bcos_train.utils.compiling import compiler_name

from .runs import TINY, compose
from .toys import TinyNet, fit, make_data, make_module

needs_compiler = pytest.mark.skipif(not shutil.which(compiler_name()), reason="needs a C++ compiler")


@needs_compiler
def test_same_steps(tmp_path: Path) -> None:
    rows, states = [], []
    for compiled in (False, True):
        data = make_data()
        torch.manual_seed(0)
        module = make_module(data, TinyNet(), compiled_batch_size=8 if compiled else None)
        expected_keys = set(module.state_dict())
        fit(tmp_path / str(compiled), data=data, module=module)
        assert set(module.state_dict()) == expected_keys
        assert module.compilation == ("as a whole" if compiled else None)
        assert module.model._compiled_call_impl is None
        rows.append(read_metrics(tmp_path / str(compiled) / "metrics.csv"))
        states.append(module.model.state_dict())
    for a, b in zip(*rows, strict=True):
        assert b["train/loss_step"] == pytest.approx(a["train/loss_step"], rel=1e-4)
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("override", ["trainer.compile=true", "model.backend=compiled"])
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    if override == "model.backend=compiled":
        pytest.importorskip("bcos_train.nn.fast")  # else there is nothing to compile
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    what = override.split(".")[1].split("=")[0]
    with pytest.raises(UserError, match=rf"{what}=.* needs a C\+\+ compiler, but there is no \w+\+\+; set CXX"):
        train(compose(tmp_path / "runs", *TINY, override))
