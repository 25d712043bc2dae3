"""ONNX files compute what the model does, or are not written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.weights import onnx_file
from bcos_train.weights.export import export
from bcos_train.weights.onnx_file import onnx_bytes

from .states import random_state

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: No logit bias, beside which a random network's logits are small.
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "num_classes": 5, "logit_bias": 0.0}


@pytest.fixture
def packages() -> None:
    for name in PACKAGES:
        pytest.importorskip(name, reason=f"needs {name}")


def write(tmp_path: Path) -> str:
    torch.save(random_state("resnet20", **SMALL), tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def run(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.usefixtures("packages")
def test_export(tmp_path: Path) -> None:
    """On another batch size; the file says what ``config.json`` would."""
    import onnx

    source = write(tmp_path)
    names = list("abcde")
    done = export(source, tmp_path / "m.onnx", model="resnet20", options=SMALL, image_size=16, class_names=names)
    model = create_model("resnet20", weights=source, **SMALL).eval()
    images = torch.rand(5, 6, 16, 16)
    with torch.no_grad():
        expected = model(images)
    assert torch.allclose(run(done.path, images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    proto = onnx.load(done.path)
    (entry,) = proto.metadata_props
    config = json.loads(entry.value)
    assert entry.key == "config"
    assert (config["model_name"], config["num_classes"], config["label_names"]) == ("resnet20", 5, names)
    assert "sha256" not in config
    assert not any(node.metadata_props for node in proto.graph.node)
    assert str(Path(onnx_file.__file__).parents[3]).encode() not in done.path.read_bytes()


@pytest.mark.usefixtures("packages")
def test_image_size_of_the_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bcos_train.weights.export as export_module

    sizes = []

    def fake(model: nn.Module, in_chans: int, size: int, metadata: object) -> bytes:
        sizes.append((in_chans, size))
        return b""

    monkeypatch.setattr(export_module, "onnx_bytes", fake)
    torch.save(random_state("resnet18", layers=(1, 1, 1, 1), num_classes=2), tmp_path / "w.pth")
    options = {"layers": (1, 1, 1, 1), "logit_bias": -0.5}
    export(str(tmp_path / "w.pth"), tmp_path / "a.onnx", model="resnet18", options=options)
    export(str(tmp_path / "w.pth"), tmp_path / "b.onnx", model="resnet18", options=options, image_size=64)
    assert sizes == [(6, 224), (6, 64)]


class WrongInOnnx(nn.Module):
    """Computes something else while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mean((2, 3)))
        return y * 1.001 if torch.compiler.is_exporting() else y


class NotExportable(WrongInOnnx):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mean((2, 3)))
        return y if bool(y.sum() > 100) else y + 1


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WrongInOnnx(), r"^the ONNX model's logits are wrong by .*, of a magnitude of .*; nothing is written$"),
        (NotExportable(), r"^torch can't export this model as ONNX: \w+: "),
    ],
    ids=["wrong", "not exportable"],
)
def test_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        onnx_bytes(model, 6, 4, {})
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("packages")
def test_logits_that_fade_to_the_bias() -> None:
    """Nothing could be compared."""
    model = create_model("plain_cnn9", num_classes=5)
    for parameter in model.parameters():
        parameter.data *= 0
    with pytest.raises(ValueError, match=r"^can't check the export: all logits equal the logit bias, .* trained\?$"):
        onnx_bytes(model, 6, 16, {})


@pytest.mark.usefixtures("packages")
def test_images_that_the_model_cannot_take() -> None:
    model = create_model("simple_vit_ti_patch16_224", num_classes=5, depth=1)
    with pytest.raises(ValueError, match=r"^the model can't take images \(4, 6, 30, 30\): "):
        onnx_bytes(model, 6, 30, {})


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("target", "keys", "message"),
    [
        ("m.onnx", {}, "the inference transform fixes no image size: set --image-size PIXELS"),
        ("m.onnx", {"image_size": 0}, "--image-size=0: at least 1"),
        ("m.pth", {"image_size": 32}, "--image-size is for a target that ends in .onnx, not for "),
    ],
)
def test_mistakes(target: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write(tmp_path)
    with pytest.raises(ValueError, match="image") as caught:
        export(source, tmp_path / target, model="resnet20", options=SMALL, **keys)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_packages_are_needed_for_onnx_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    source = write(tmp_path)
    export(source, tmp_path / "m.pth", model="resnet20", options=SMALL)
    with pytest.raises(ValueError, match=r"^writing \.onnx needs onnx, onnxscript and onnxruntime: pip install onnx "):
        export(source, tmp_path / "m.onnx", model="resnet20", options=SMALL, image_size=8)
