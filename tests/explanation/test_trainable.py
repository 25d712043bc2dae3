"""Attribution maps in a loss: values, and their gradient against finite differences in float64."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.explanation import attribution_maps, explanation_mode, find_layer
from bcos_train.explanation.method import GradCam, make_method
from bcos_train.nn import set_backend

TARGET = torch.tensor([1, 4, 1])
SMALL: dict[str, Any] = {"inplanes": 4, "num_classes": 5, "layers": (1, 1, 1)}


class Standard(nn.Module):
    """A standard network with in-place activations."""

    in_chans = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.layer2 = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = (create_model("resnet20", **SMALL) if name == "bcos" else Standard()).double()
    for tensor in model.parameters():
        if tensor.dim() < 2:
            tensor.data += 0.2 * torch.randn_like(tensor)
    return model


def images(model: nn.Module, n: int = 3) -> Tensor:
    rgb = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return torch.cat([rgb, 1 - rgb], 1)[:, : model.in_chans]  # type: ignore[index]


def loss_of(logits: Tensor, maps: Tensor) -> Tensor:
    wanted = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2), dtype=maps.dtype)
    scale = torch.arange(1, len(maps) + 1, dtype=maps.dtype)
    similarity = F.cosine_similarity(maps.flatten(1), wanted.flatten(1))
    return (scale * (1 - similarity)).sum() + 0.1 * F.cross_entropy(logits, TARGET) + maps.square().mean()


CASES = [
    ("bcos", "bcos", "input"),
    ("bcos", "bcos", "mid1"),
    ("bcos", "bcos", "final"),
    ("bcos", "ixg", "mid2"),
    ("standard", "ixg", "input"),
    ("standard", "ixg", "mid1"),
    ("standard", "grad_cam", "final"),
]


@pytest.mark.parametrize(("name", "method", "layer"), CASES)
def test_the_gradient_is_that_of_finite_differences(name: str, method: Any, layer: str) -> None:
    model = build(name)
    x, parameters = images(model), list(model.parameters())
    grads = torch.autograd.grad(loss_of(*attribution_maps(model, x, TARGET, method, layer)), parameters)
    grad = torch.cat([grad.flatten() for grad in grads])
    typical, generator = float(grad.norm()) / len(grad) ** 0.5, torch.Generator().manual_seed(3)
    for _ in range(8):
        direction = F.normalize(torch.randn(len(grad), generator=generator, dtype=grad.dtype), dim=0)
        parts = direction.split([p.numel() for p in parameters])
        for h in (1e-6, 1e-7):  # larger steps cross the kinks of |cos| and ReLU
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    for p, part in zip(moved.parameters(), parts, strict=True):
                        p += sign * h * part.view_as(p)
                values.append(float(loss_of(*attribution_maps(moved, x, TARGET, method, layer)).detach()))
            expected = float(grad @ direction)
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-4, abs=1e-3 * typical)


def test_maps_of_the_input() -> None:
    model = build("bcos").eval()
    x = images(model)
    logits, maps = attribution_maps(model, x, TARGET)
    torch.testing.assert_close(maps.detach(), explain(model, x, TARGET).contribution_map)
    torch.testing.assert_close(logits, model(x))
    for kind in ("bcos", "standard"):
        model = build(kind).eval()
        x = images(model)
        expected = make_method("ixg")(model, x, TARGET[:, None])[:, 0]
        torch.testing.assert_close(attribution_maps(model, x, TARGET, "ixg")[1].detach(), expected)


@pytest.mark.parametrize("layer", ["layer1", "layer3"])
def test_maps_of_features_sum_to_what_the_rest_of_the_network_adds(layer: str) -> None:
    model = build("bcos").eval()
    x = images(model)
    maps = attribution_maps(model, x, TARGET, "bcos", layer)[1].detach()
    recorded: list[Tensor] = []
    handle = find_layer(model, layer).register_forward_hook(lambda module, args, output: recorded.append(output))
    with explanation_mode(model):
        selected = model(x.requires_grad_()).gather(1, TARGET[:, None]).sum()
        (gradient,) = torch.autograd.grad(selected, recorded)
    handle.remove()
    torch.testing.assert_close(maps, (gradient * recorded[0]).sum(1).detach())


def test_grad_cam_is_that_of_the_evaluation() -> None:
    """But for the mean over positions in place of the sum."""
    model = build("standard").eval()
    x = images(model)
    maps = attribution_maps(model, x, TARGET, "grad_cam", "final")[1].detach()
    positions = maps[0].numel()
    expected = F.interpolate(maps[:, None], size=x.shape[2:], mode="bilinear")[:, 0] * positions
    torch.testing.assert_close(GradCam("bilinear")(model, x, TARGET[:, None])[:, 0], expected)
    assert (maps > 0).any()


@pytest.mark.parametrize("name", ["bcos", "standard"])
@pytest.mark.parametrize("layer", ["input", "mid1"])
def test_one_ordinary_forward_pass(name: str, layer: str) -> None:
    model = build(name)
    again, x = copy.deepcopy(model), images(model)
    logits, _ = attribution_maps(model, x, TARGET, "ixg", layer)
    expected = again(x)
    torch.testing.assert_close(logits, expected)
    for ours, theirs in zip(model.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for value, network in ((logits, model), (expected, again)):
        F.cross_entropy(value, TARGET).backward()
        assert not any(module._forward_hooks for module in network.modules())
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_every_backend_and_recomputed_blocks(backend: Any) -> None:
    model = build("bcos")
    again = copy.deepcopy(model)
    set_backend(again, backend)
    again.set_grad_checkpointing()  # type: ignore[operator]
    x = images(model)
    for network in (model, again):
        loss_of(*attribution_maps(network, x, TARGET, "bcos", "mid2")).backward()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_layers_before_the_features() -> None:
    model = build("standard")
    for parameter in model.layer1.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    _, maps = attribution_maps(model, images(model), TARGET, "ixg", "layer1")
    maps.sum().backward()
    assert model.fc.weight.grad is not None  # type: ignore[union-attr]


def test_stages_are_found() -> None:
    small, large, standard = (create_model(name) for name in ("resnet20", "resnet18", "standard_resnet18"))
    assert find_layer(small, "final") is small.layer3
    assert find_layer(small, "mid2") is small.layer2
    for model in (large, standard):
        assert [find_layer(model, name) for name in ("mid1", "mid2", "mid3", "final")] == [
            model.layer1,
            model.layer2,
            model.layer3,
            model.layer4,
        ]
    dense = create_model("densenet52")
    assert find_layer(dense, "features") is dense.features


def test_one_class_for_all_images() -> None:
    model = build("bcos").eval()
    one, each = (attribution_maps(model, images(model), target)[1] for target in (2, torch.full_like(TARGET, 2)))
    assert torch.equal(one, each)


def test_mistakes() -> None:
    model = build("bcos")
    with pytest.raises(ValueError, match=r"has no layer 'mid3'; there are input, mid1, mid2, final, conv1, bn1"):
        find_layer(model, "mid3")
    with pytest.raises(ValueError, match=r"'logit_layer' is \(3, 5\); a map needs feature maps"):
        attribution_maps(model, images(model), TARGET, "bcos", "logit_layer")
    with pytest.raises(ValueError, match=r"method='gradcam': bcos, ixg or grad_cam; did you mean grad_cam\?"):
        attribution_maps(model, images(model), TARGET, "gradcam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method='grad_cam' explains features, not the input; use layer='final'"):
        attribution_maps(model, images(model), TARGET, "grad_cam")
    with pytest.raises(ValueError, match=r"method='bcos': Sequential is no B-cos network; use ixg or grad_cam"):
        attribution_maps(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), images(model), TARGET)
    for target, problem in ((TARGET[:1], "not (1,) torch.int64"), (TARGET.float(), "torch.float32"), (5, "0 to 4")):
        with pytest.raises(ValueError, match=re.escape(problem)):
            attribution_maps(model, images(model), target)
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match="'unused' is called 0 times in a forward pass, not once"):
        attribution_maps(model, images(model), TARGET, "bcos", "unused")
