"""Weights of models built by timm: verified official ones, and the user's."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import bcos_train.timm  # noqa: F401 - registers the models
from bcos_train import create_model
from bcos_train.weights import source as weights_source
from bcos_train.weights.files import save_weights


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Stands for the official ResNet-18; a download by torch.hub or timm is an error."""
    torch.manual_seed(3)
    state = create_model("resnet18").state_dict()
    monkeypatch.setattr(weights_source, "load_official", lambda name, progress: state)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an unverified download")

    for place in ("torch.hub", "timm.models._builder"):
        monkeypatch.setattr(f"{place}.load_state_dict_from_url", refuse)
    return state


def same(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors are those of ``state``."""
    return [key for key, value in model.state_dict().items() if torch.equal(value, state[key])]


def test_official_weights(official: dict[str, Tensor]) -> None:
    model = timm.create_model("bcos_resnet18", pretrained=True)
    assert same(model, official) == list(official)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_official_weights_and_other_classes(num_classes: int, official: dict[str, Tensor]) -> None:
    model = timm.create_model("bcos_resnet18", pretrained=True, num_classes=num_classes)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert rest.keys() == {key for key in official if not key.startswith("fc.")}
    assert all(torch.equal(value, official[key]) for key, value in rest.items())
    assert model.num_classes == num_classes


def test_official_weights_for_features(official: dict[str, Tensor]) -> None:
    net = timm.create_model("bcos_resnet18", pretrained=True, features_only=True)
    assert same(net, official) == [key for key in official if not key.startswith("fc.")]


def test_official_weights_and_other_channels(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"conv1\.linear\.weight has the shape"):
        timm.create_model("bcos_resnet18", pretrained=True, in_chans=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache_dir": "weights"},
            "cache_dir=weights: official weights are cached under the environment",
        ),
        ({"pretrained_cfg_overlay": {"url": "https://example.org/w.pth"}}, "not loaded from https://example.org/w.pth"),
    ],
    ids=["cache_dir", "url"],
)
def test_no_unverified_download(options: dict[str, Any], message: str, official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("bcos_resnet18", pretrained=True, **options)


def test_weights_of_a_file(official: dict[str, Tensor], tmp_path: Path) -> None:
    model = create_model("resnet18")
    save_weights(model, tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    loaded = timm.create_model("bcos_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(loaded, model.state_dict()) == list(model.state_dict())


def test_folder_written_by_timm(tmp_path: Path) -> None:
    model = timm.create_model("bcos_resnet20", num_classes=4, norm_layer="bnu")
    save_for_hf(model, tmp_path, model_args={"norm_layer": "bnu"})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_classes == 4
    assert same(loaded, model.state_dict()) == list(model.state_dict())


def test_checkpoint_path(tmp_path: Path) -> None:
    model = create_model("resnet20")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    loaded = timm.create_model("bcos_resnet20", checkpoint_path=tmp_path / "own.pth")
    assert same(loaded, model.state_dict()) == list(model.state_dict())
