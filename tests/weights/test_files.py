"""Weights from files into models: all of them, or all but another number of classes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bcos_train import create_model, list_models
from bcos_train.nn import BcosConv2d
from bcos_train.runs import checkpoint
from bcos_train.weights import source
from bcos_train.weights.files import read_weights, save_weights
from bcos_train.weights.state_dict import load_weights

from .states import State, assert_same, random_state, seeded


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = BcosConv2d(6, 8, 3), BcosConv2d(8, 4, 1)


def write_run(state: State, folder: Path) -> Path:
    folder.mkdir()
    save_file({key: value + 1 for key, value in state.items()}, folder / "model.safetensors")
    save_file(state, folder / "model_ema.safetensors")
    return folder


def write_export(state: State, folder: Path) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def write(function: Callable[[Any, Path], None], content: Any, path: Path) -> Path:
    function(content, path)
    return path


KINDS: dict[str, Callable[[State, Path], Path]] = {
    "pth": lambda state, folder: write(torch.save, state, folder / "w.pth"),
    "pth in state_dict": lambda state, folder: write(torch.save, {"state_dict": state, "n": 3}, folder / "w.pth"),
    "pth before torch 1.6": lambda state, folder: write(
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False), state, folder / "w.pth"
    ),
    "safetensors": lambda state, folder: write(save_file, state, folder / "w.safetensors"),
    "ckpt": lambda state, folder: write(checkpoint.save, {"model": state}, folder / "w.ckpt"),
    "ckpt with an average": lambda state, folder: write(
        checkpoint.save, {"model": {}, "model_ema": state}, folder / "w.ckpt"
    ),
    "run folder with an average": lambda state, folder: write_run(state, folder / "run"),
    "exported folder": lambda state, folder: write_export(state, folder / "export"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_create_model_takes(kind: str, tmp_path: Path) -> None:
    state = random_state("resnet20")
    path = KINDS[kind](state, tmp_path)
    for given in (path, str(path)):
        assert_same(dict(create_model("resnet20", weights=given).state_dict()), state)


@pytest.mark.parametrize("use_ema", [None, False, True])
@pytest.mark.parametrize("kind", ["ckpt", "folder"])
def test_average(kind: str, use_ema: bool | None, tmp_path: Path) -> None:
    plain, average = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    path = tmp_path / "last.ckpt"
    if kind == "folder":
        path = tmp_path
        save_file(plain, path / "model.safetensors")
        save_file(average, path / "model_ema.safetensors")
    else:
        checkpoint.save({"model": plain, "model_ema": average}, path)
    state, is_ema = read_weights(path, use_ema)
    assert is_ema == (use_ema is not False)
    assert_same(state, average if is_ema else plain)


def test_folder_without_the_requested_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        read_weights(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no averaged weights, only the plain ones in model\.safetensors$"):
        read_weights(tmp_path, use_ema=True)


def test_safetensors_is_only_needed_for_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_same(read_weights(tmp_path / "w.pth")[0], state)
    with pytest.raises(ValueError, match=r"w\.safetensors needs the package safetensors: pip install safetensors"):
        read_weights(tmp_path / "w.safetensors")


def test_save_and_read(tmp_path: Path) -> None:
    model = create_model("resnet20").to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "w.safetensors")
    assert_same(read_weights(tmp_path / "w.safetensors")[0], dict(model.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert load_file(tmp_path / "w.safetensors")["conv1.linear.weight"].is_contiguous()


def test_reading_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds a Python object \(\w+\.mkdir\), and reading that could run code"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_a_truncated_file(old: bool, tmp_path: Path) -> None:
    torch.save(random_state("resnet20"), tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"w\.pth is not a weights file, or only part of one$"):
        create_model("resnet20", weights=tmp_path / "w.pth")


# ---- what doesn't fit


def test_first_of_each_kind_is_named() -> None:
    model = TinyNet()
    state = dict(model.state_dict())
    assert load_weights(model, state, "file") == []
    state["hed.linear.weight"] = state.pop("head.linear.weight")
    state["conv.linear.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="doesn't fit") as caught:
        load_weights(model, state, "file")
    assert str(caught.value) == (
        "file doesn't fit the model: head.linear.weight is missing; hed.linear.weight is unknown; did you mean "
        "head.linear.weight?; conv.linear.weight has the shape (1,), the model (8, 6, 3, 3)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 3}, "loaded with in_chans=3, doesn't fit the model: conv1.linear.weight has the shape "),
        ({"max_out": 1, "num_classes": 7}, "conv1.linear.weight has the shape (32, 6, 3, 3), the model (16, 6, 3, 3)"),
        (
            {"norm_layer": "bnu"},
            "21 of the model's 127 tensors (bn1.bias, layer1.0.bn1.bias, layer1.0.bn2.bias and 18 more)",
        ),
    ],
    ids=["in_chans", "max_out", "norm_layer"],
)
def test_options_that_change_shapes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(random_state("resnet20", norm_layer="bnu-linear"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="doesn't fit the model") as caught:
        create_model("resnet20", weights=tmp_path / "w.pth", **{"norm_layer": "bnu-linear", **options})
    assert message in str(caught.value).replace("norm_layer=bnu-linear, ", "")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("oficial", "weights=oficial: no such file; did you mean official?"),
        ("x/w.pth", "weights=x/w.pth: no such file"),
    ],
)
def test_no_such_file(weights: str, message: str) -> None:
    with pytest.raises(ValueError, match="no such file") as caught:
        create_model("resnet20", weights=weights)
    assert str(caught.value) == message


# ---- another number of classes


CLASSIFIERS = {
    "resnet18": {"fc.linear.weight"},
    "densenet121": {"classifier.linear.weight"},
    "vgg11_bnu": {"classifier.4.linear.weight"},
    "standard_resnet18": {"fc.weight", "fc.bias"},
}


@pytest.mark.parametrize("name", ["resnet18", "standard_resnet18", "densenet121"])
def test_new_classifier(name: str, tmp_path: Path) -> None:
    state = random_state(name)
    torch.save(state, tmp_path / "w.pth")
    loaded = dict(seeded(name, num_classes=7, weights=tmp_path / "w.pth").state_dict())
    fresh = dict(seeded(name, num_classes=7).state_dict())
    different = {key for key in state if loaded[key].shape != state[key].shape}
    assert different == CLASSIFIERS[name]
    assert_same(loaded, {key: fresh[key] if key in different else value for key, value in state.items()})


@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_every_official_model_takes_a_new_classifier(name: str) -> None:
    """By shapes alone: what depends on the number of classes belongs to the classifier."""
    with torch.device("meta"):
        state, model = create_model(name).state_dict(), create_model(name, num_classes=7)
    different = {key for key, value in model.state_dict().items() if state[key].shape != value.shape}
    model.load_state_dict = lambda *args, **kwargs: None  # type: ignore[assignment, method-assign]
    assert set(load_weights(model, state, "file", new_classifier=True)) == different
    assert 1 <= len(different) <= 2
    with pytest.raises(ValueError, match=r"the model \(7, .*\): another number of classes$"):
        load_weights(model, state, "file")


def test_another_number_of_classes_must_be_requested(tmp_path: Path) -> None:
    torch.save(random_state("resnet20", num_classes=7), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"fc\.linear\.weight has .*: another number of classes$"):
        create_model("resnet20", weights=tmp_path / "w.pth")
    create_model("resnet20", weights=tmp_path / "w.pth", num_classes=10)


# ---- official ones


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Official weights are random; the list receives each model that is loaded, and whether with a progress bar."""
    calls: list[tuple[str, bool]] = []

    def load_official(name: str, progress: bool) -> State:
        calls.append((name, progress))
        with torch.random.fork_rng(devices=[]):
            return random_state(name)

    monkeypatch.setattr(source, "load_official", load_official)
    return calls


def test_official_weights(loaded: list[tuple[str, bool]]) -> None:
    state = random_state("resnet18")
    assert_same(dict(create_model("resnet18", pretrained=True).state_dict()), state)
    assert_same(dict(create_model("resnet18", weights="official", progress=False).state_dict()), state)
    assert loaded == [("resnet18", True), ("resnet18", False)]


def test_options_of_official_weights_are_free(loaded: list[tuple[str, bool]]) -> None:
    assert create_model("resnet18", pretrained=True, b=1.5).fc.b == 1.5


def test_drawing_is_the_same_with_weights(loaded: list[tuple[str, bool]]) -> None:
    seeded("resnet18")
    expected = torch.rand(3)
    seeded("resnet18", pretrained=True)
    assert torch.equal(torch.rand(3), expected)


def test_models_without_official_weights() -> None:
    with pytest.raises(ValueError, match=r"^resnet20 has no official weights; near it, resnet.* have$"):
        create_model("resnet20", pretrained=True)
    with pytest.raises(ValueError, match=r"^plain_cnn9 has no official weights; see list_models\(pretrained=True\)$"):
        create_model("plain_cnn9", weights="official")


def test_pretrained_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^pretrained=True loads the official weights: set either that or weights=w\.pth"
    ):
        create_model("resnet20", pretrained=True, weights="w.pth")


# ---- files that are not what they should be


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors", "run/model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "is a Git LFS pointer, not the file"),
        ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"is a web page \(HTML\), not the file itself: "),
        ("", "is empty$"),
    ],
)
def test_substitutes(content: str, message: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name} {message}") as caught:
        create_model("resnet20", weights=path.parent if path.parent != tmp_path else path)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state, path = random_state("resnet20"), tmp_path / "w.pth"
    torch.save({key: value * torch.nan if key == "bn1.weight" else value for key, value in state.items()}, path)
    with pytest.warns(UserWarning, match=r"w\.pth: bn1\.weight is not finite \(NaN or infinity\)$"):
        create_model("resnet20", weights=path)
    for key in list(state)[:5]:
        state[key].flatten()[:1] = torch.inf if state[key].is_floating_point() else 0
    torch.save(state, path)
    expected = r"w\.pth: \d of the file's \d+ tensors \(conv1\.linear\.weight, .* more\) are not finite \(NaN or inf"
    with pytest.warns(UserWarning, match=expected):
        create_model("resnet20", weights=path)
    buffers = [key for key in state if "running" in key]
    torch.save({key: state[key] if key in buffers else state[key] * torch.nan for key in state}, path)
    with pytest.raises(ValueError, match=r"w\.pth holds no finite weight, only NaN and infinity: its training div"):
        create_model("resnet20", weights=path)
