"""The one-file ResNet against the package, with the same weights."""

import ast
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bcos_train import create_model

PATH = Path(__file__).parents[2] / "extra" / "minimal_bcos_resnet.py"
minimal: Any = SimpleNamespace(**runpy.run_path(str(PATH), run_name="minimal"))


def batch(size: int, n: int = 1, seed: int = 0) -> Tensor:
    rgb = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return torch.cat([rgb, 1 - rgb], dim=1)


def twins(name: str, num_classes: int) -> tuple[Any, Any]:
    """Build both networks with the same random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    package: Any = create_model(name, num_classes=num_classes)
    with torch.no_grad():
        for key, value in package.state_dict().items():
            if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.uniform_(0.5, 1.5)
        package(batch(64, n=2))
    ours = minimal.bcos_resnet(name, num_classes)
    ours.load_state_dict(package.state_dict(), strict=True)
    return ours.eval(), package.eval()


def error(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", minimal.ARCHITECTURES)
def test_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, package = minimal.bcos_resnet(name).state_dict(), create_model(name).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in package.items()}


@pytest.mark.parametrize("target", [None, 4])
@pytest.mark.parametrize(("name", "size"), [("resnet18", 96), ("resnet50", 64)])
def test_outputs_and_explanations(name: str, size: int, target: int | None) -> None:
    ours, package = twins(name, num_classes=11)
    x = batch(size)
    with torch.no_grad():
        assert error(ours(x), package(x)) < 1e-6
    # In float64: a color is divided by the largest of its pixel's weights, which float32 may have rounded to nothing.
    ours, package, x = ours.double(), package.double(), x.double()
    found, expected = minimal.explain(ours, x, target), package.explain(x, target)
    assert found.keys() == expected.keys()
    for key in ("prediction", "explained_class_idx"):
        assert found[key] == expected[key]
    assert target in (None, found["explained_class_idx"])
    for key in ("dynamic_linear_weights", "contribution_map"):
        assert error(found[key], expected[key]) < 1e-5
    assert found["explanation"].shape == (size, size, 4)
    assert (found["explanation"] - torch.from_numpy(expected["explanation"])).abs().max() < 1e-5


def test_logit_is_linear_in_the_input() -> None:
    ours = twins("resnet18", num_classes=5)[0].double()
    x = batch(64).double()
    result = minimal.explain(ours, x)
    logit = ours(x)[0, result["prediction"]].item()
    assert result["contribution_map"].sum().item() - math.log(4) == pytest.approx(logit, rel=1e-12)


def test_a_training_step() -> None:
    ours, package = twins("resnet18", num_classes=5)
    x = batch(64, n=3)
    for model in (ours, package):
        model.train()(x).square().mean().backward()
    gradients = dict(package.named_parameters())
    for key, parameter in ours.named_parameters():
        assert error(parameter.grad, gradients[key].grad) < 1e-3, key
    expected = package.state_dict()
    for key, value in ours.state_dict().items():
        if "running" in key or "num_batches" in key:
            assert torch.allclose(value, expected[key], rtol=1e-4), key


def test_explaining_has_no_side_effects() -> None:
    model, x = twins("resnet18", num_classes=5)[0], batch(64)
    before = x.clone()
    first = minimal.explain(model, x)["dynamic_linear_weights"].clone()
    with minimal.explanation_mode(model):
        with pytest.raises(ValueError), minimal.explanation_mode(model):
            raise ValueError
        assert model.conv1.is_explaining
    assert not any(getattr(module, "is_explaining", False) for module in model.modules())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(minimal.explain(model, x)["dynamic_linear_weights"], first)


@pytest.mark.parametrize(
    ("shape", "training"), [((2, 6, 64, 64), False), ((1, 3, 64, 64), False), ((1, 6, 64, 64), True)]
)
def test_invalid_inputs(shape: tuple[int, ...], training: bool) -> None:
    with pytest.raises(ValueError, match=r"needs x \(1, 6, H, W\) and model\.eval\(\), got \("):
        minimal.explain(minimal.bcos_resnet("resnet18", 3).train(training), torch.rand(shape))


# The file.


def test_imports_only_torch() -> None:
    """At the top; Pillow is imported by the functions that read and write image files."""
    imported = [node for node in ast.parse(PATH.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in imported if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}


def test_length() -> None:
    assert len(PATH.read_text().splitlines()) <= 250


def test_demo_without_arguments(tmp_path: Path) -> None:
    """Run where nothing but torch can be imported of what is installed here."""
    code = f"""
import runpy, sys
for name in ("PIL", "torchvision", "matplotlib", "timm", "bcos", "bcos_train"):
    sys.modules[name] = None
sys.argv = ["minimal_bcos_resnet.py"]
runpy.run_path({str(PATH)!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert float(first.split()[-1]) == pytest.approx(float(second.split()[-1]), abs=1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(380, 300), (224, 501), (256, 256)], ids=str)
def test_image_is_loaded_as_by_the_model(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "image.png")
    with torch.device("meta"):
        model: Any = create_model("resnet18")
    assert torch.equal(minimal.load_image(tmp_path / "image.png")[0], model.transform(image))


def test_demo_with_weights_and_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    package: Any = create_model("resnet18").eval()
    torch.save(package.state_dict(), "weights.pth")
    Image.linear_gradient("L").resize((300, 260)).save("image.png")
    minimal.main("resnet18", "weights.pth", "image.png")
    expected = package.explain(minimal.load_image("image.png"))
    assert capsys.readouterr().out.startswith(f"class {expected['prediction']}, logit ")
    with Image.open("explanation.png") as image:
        assert (image.mode, image.size) == ("RGBA", (224, 224))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 4)
    assert (pixels / 255 - torch.from_numpy(expected["explanation"])).abs().max() < 0.5 / 255 + 1e-4
