"""Weights as other programs save them."""

import argparse
import enum
import functools
import pathlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bcos_train import create_model, load
from bcos_train.weights.export import export
from bcos_train.weights.source import read_weights_source
from bcos_train.weights.state_dict import load_weights

from .states import State, assert_same, random_state

STATE = random_state("resnet20")
#: Other weights, told apart from those to load.
OTHER = {key: value + 1 for key, value in STATE.items()}
#: Tensors outside of layer1; missing counters are 0.
N_OUTSIDE = sum(not key.startswith("layer1.") and not key.endswith("num_batches_tracked") for key in STATE)
LIGHTNING = {"pytorch-lightning_version": "2.5.0", "epoch": 3, "global_step": 12}


class Color(enum.Enum):
    RED = 1


def prefixed(prefix: str, state: State = STATE) -> State:
    return {prefix + key: value for key, value in state.items()}


def objects() -> dict[str, Any]:
    """What programs save beside the weights."""
    return {
        "args": argparse.Namespace(lr=0.1, output=pathlib.PosixPath("out")),
        "best": np.float64(0.9),
        "color": Color.RED,
        "activation": functools.partial(torch.relu),
        "schedule": [argparse.Namespace(epochs={1, 2})],
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "rng": torch.get_rng_state(),
    }


PLAIN: dict[str, dict[str, Any]] = {
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "attribute": prefixed("net."),
    "nested attributes": prefixed("model.backbone."),
    "compiled blocks": {key.replace("layer1.", "layer1._orig_mod."): value for key, value in STATE.items()},
    "with a loss": prefixed("net.") | {"loss.weight": torch.ones(10), "n_updates": torch.tensor(3)},
    "with another network": prefixed("student.") | {"teacher.stem.weight": torch.ones(3)},
    "without counters": {key: value for key, value in STATE.items() if "num_batches_tracked" not in key},
    "model": {"model": STATE, "epoch": 3},
    "beside another network": {"student": STATE, "teacher": {"stem.weight": torch.ones(3)}},
    "beside a wrapped network": {"net": prefixed("module."), "discriminator": {"bn1.weight": torch.ones(3)}},
    "model_state_dict": {"model_state_dict": prefixed("module."), "optimizer_state_dict": {"state": {}}},
    "any one": {"weights": STATE, "step": 3},
    "model and criterion": {"criterion": {"weight": torch.ones(10)}, "model": STATE},
    "objects": {"state_dict": STATE, **objects()},
    "lightning": {**LIGHTNING, "state_dict": prefixed("net."), "hyper_parameters": {"lr": 0.1}},
    "lightning with objects": {**LIGHTNING, "state_dict": prefixed("model."), "hyper_parameters": objects()},
    "lightning with an object": {
        **LIGHTNING,
        "state_dict": prefixed("model."),
        "hyper_parameters": argparse.Namespace(a=1),
    },
}
AVERAGED: dict[str, dict[str, Any]] = {
    "timm": {"state_dict": OTHER, "state_dict_ema": STATE, "arch": "resnet20"},
    "torchvision": {
        "model": OTHER,
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")},
        "args": argparse.Namespace(lr=0.1),
    },
    "attributes": {**LIGHTNING, "state_dict": prefixed("net.", OTHER) | prefixed("net_ema.")},
    "ema_pytorch": prefixed("online_model.", OTHER) | prefixed("ema_model.") | {"initted": torch.tensor(True)},
    "official": {
        **LIGHTNING,
        "state_dict": prefixed("model.", OTHER) | prefixed("ema.module.") | {"ema.n_averaged": torch.tensor(3)},
        "hyper_parameters": {},
    },
    "BasicSR": {"params": OTHER, "params_ema": STATE},
    "WeightAveraging": {
        **LIGHTNING,
        "state_dict": STATE,
        "current_model_state": OTHER,
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
}


def restored(state: State) -> State:
    """Counters that are missing from a file are 0."""
    return {key: value if key in state else torch.zeros_like(value) for key, value in STATE.items()}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
@pytest.mark.parametrize("form", PLAIN)
def test_plain_weights(form: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".ckpt" and "model" in PLAIN[form]:
        pytest.skip("without a digest, our own checkpoint is damaged")
    path = tmp_path / f"w{suffix}"
    torch.save(PLAIN[form], path)
    expected = restored(PLAIN[form]) if form == "without counters" else STATE
    assert_same(dict(create_model("resnet20", weights=path).state_dict()), expected)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        read_weights_source(path, use_ema=True)


@pytest.mark.parametrize("form", AVERAGED)
def test_averaged_weights(form: str, tmp_path: Path) -> None:
    torch.save(AVERAGED[form], tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"w\.pth holds plain and averaged weights: the averaged ones are used \("):
        assert_same(dict(create_model("resnet20", weights=tmp_path / "w.pth").state_dict()), STATE)
    model = create_model("resnet20")
    source = read_weights_source(tmp_path / "w.pth", use_ema=False)
    load_weights(model, source.state, "file")
    assert_same(dict(model.state_dict()), OTHER)


def test_averaged_model_alone(tmp_path: Path) -> None:
    model = create_model("resnet20")
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), tmp_path / "w.pth")
    source = read_weights_source(tmp_path / "w.pth")
    assert source.is_ema
    assert_same(dict(create_model("resnet20", weights=tmp_path / "w.pth").state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"holds no plain weights, only the averaged ones$"):
        read_weights_source(tmp_path / "w.pth", use_ema=False)


def test_safetensors(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    assert_same(dict(create_model("resnet20", weights=tmp_path / "w.safetensors").state_dict()), STATE)


def test_number_of_classes_and_export(tmp_path: Path) -> None:
    state = random_state("resnet20", num_classes=7)
    torch.save({"model": prefixed("module.", state)}, tmp_path / "w.pth")
    assert_same(dict(load(tmp_path / "w.pth", model="resnet20").model.state_dict()), state)
    export(str(tmp_path / "w.pth"), tmp_path / "out.pth", model="resnet20")
    assert_same(torch.load(tmp_path / "out.pth"), state)


def test_own_buffers_are_no_average(tmp_path: Path) -> None:
    """A module may have buffers with such names, and keys that all begin alike."""

    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 2)
            self.register_buffer("ema_count", torch.rand(4))

    torch.save(Codebook().state_dict(), tmp_path / "w.pth")
    source = read_weights_source(tmp_path / "w.pth")
    assert not source.is_ema
    model = Codebook()
    load_weights(model, source.state, "file")
    assert_same(dict(model.state_dict()), dict(source.state))


def test_origin_of_other_projects(tmp_path: Path) -> None:
    torch.save(PLAIN["lightning"], tmp_path / "w.ckpt")
    assert read_weights_source(tmp_path / "w.ckpt").origin == "w.ckpt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"student": STATE, "teacher": OTHER},
            "w.pth holds this model more than once, as student.* and teacher.*: save the state_dict() of one alone",
        ),
        (
            {"model": STATE, "best_model": OTHER},
            "w.pth holds this model more than once, as model.* and best_model.*: save the state_dict() of one alone",
        ),
        (
            {"ema_short": STATE, "ema_long": OTHER},
            "w.pth holds this model more than once, as ema_short.* and ema_long.*: save the state_dict() of one alone",
        ),
        ({"epoch": 3, "state": {"model": STATE}}, "holds none one level below; its keys: epoch and state"),
        ([1, 2], "w.pth is not a state dict of tensors, and holds none one level below"),
        ({"model": argparse.Namespace()}, "w.pth holds a Python object (argparse.Namespace), and reading that could"),
        (argparse.Namespace(), "w.pth holds a Python object (argparse.Namespace), and reading that could"),
        (nn.Linear(2, 1), "w.pth holds a Python object (torch.nn.modules.linear.Linear), and reading that could"),
        (
            prefixed("student.") | prefixed("teacher."),
            "w.pth holds this model more than once, as student.* and teacher.*: save the state_dict() of one alone",
        ),
        (
            {f"stem.{i}": torch.zeros(1) for i in range(5)},
            "w.pth doesn't fit the model: none of its keys, stem.0, stem.1, stem.2 and 2 more, is one of the model's, "
            "conv1.linear.weight, bn1.weight, ",
        ),
        (
            {f"net.{key}": value for key, value in STATE.items() if key != "bn1.weight"},
            "w.pth doesn't fit the model: bn1.weight is missing",
        ),
        (
            {key: value for key, value in STATE.items() if key.startswith("layer1.")} | {"x": torch.ones(1)},
            f"w.pth doesn't fit the model: {N_OUTSIDE} of the model's {len(STATE)} tensors (conv1.linear.weight, "
            f"bn1.weight, bn1.running_mean and {N_OUTSIDE - 3} more) are missing; x is unknown",
        ),
        (
            {key: value[..., None] if key == "bn1.running_var" else value for key, value in STATE.items()},
            "w.pth doesn't fit the model: bn1.running_var has the shape (16, 1), the model (16,)",
        ),
        (
            {key: value[..., None] if value.ndim == 1 else value for key, value in STATE.items()},
            "w.pth doesn't fit the model: bn1.weight has the shape (16, 1), the model (16,); "
            f"{sum(value.ndim == 1 for value in STATE.values()) - 1} more of the model's {len(STATE)} shapes differ",
        ),
    ],
)
def test_what_is_not_recognized(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth") as caught:
        create_model("resnet20", weights=tmp_path / "w.pth")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 1), torch.rand(1, 2)), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"is a TorchScript file: save the state_dict\(\) of its model instead$"):
        create_model("resnet20", weights=tmp_path / "w.pth")


class Trap:
    """Runs code when it is unpickled, in each of the ways that pickle has."""

    calls: ClassVar[list[str]] = []

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        ways: dict[str, Any] = {
            "call": (touch, ("call",)),
            "method": (Trap.method, ("method",)),
            "set": (Trap, ("call",), {"how": "call"}),
            "eval": (eval, ("1 + 1",)),
        }
        return ways[self.how]

    def __setstate__(self, state: object) -> None:
        Trap.calls.append("set")

    @staticmethod
    def method(how: str) -> None:
        Trap.calls.append(how)


def touch(how: str) -> None:
    Trap.calls.append(how)


@pytest.mark.parametrize("how", ["call", "set", "eval"])
@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks"])
def test_objects_beside_the_weights_run_no_code(
    place: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trap, "calls", [])
    torch.save({**LIGHTNING, "state_dict": prefixed("net."), place: {"x": Trap(how)}}, tmp_path / "w.ckpt")
    allowed = torch.serialization.get_safe_globals()
    assert_same(dict(create_model("resnet20", weights=tmp_path / "w.ckpt").state_dict()), STATE)
    assert Trap.calls == []
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_what_placeholders_cannot_stand_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trap, "calls", [])
    torch.save({"model": STATE, "x": Trap("method")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"holds a Python object \(.*Trap.*\), and reading that could run code"):
        create_model("resnet20", weights=tmp_path / "w.pth")
    assert Trap.calls == []
