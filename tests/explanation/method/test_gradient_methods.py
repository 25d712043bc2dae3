"""Gradient-based methods, against one image, one target and one backward pass at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from bcos.models.resnet import cifar10_resnet20
from bcos.modules import BcosConv2d, norms
from method_models import NAMES, SmallConvNet, assert_same, encode, make_input, make_model
from torch import Tensor, nn

from bcos_train.explanation.method import CannotExplain, make_method


def one_by_one(function: Callable[[nn.Module, Tensor, int], Tensor], name: str, **options: Any) -> Tensor:
    """Stack maps (N, T, H, W) of a function that returns (1, C, H, W) for one image (1, C, H, W) and target."""
    model = make_model(name).eval()
    x, targets = make_input(name)
    maps = [[function(model, x[n : n + 1], int(k), **options)[0].sum(0) for k in targets[n]] for n in range(len(x))]
    model.train()
    return torch.stack([torch.stack(row) for row in maps]).detach()


def gradient(model: nn.Module, x: Tensor, k: int) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[0, k], x)[0]


def riemann(model: nn.Module, x: Tensor, k: int, n_steps: int) -> Tensor:
    total = torch.zeros_like(x)
    for step in range(n_steps):
        total += gradient(model, (step + 0.5) / n_steps * x, k) / n_steps
    return total * x


def gauss(model: nn.Module, x: Tensor, k: int, n_steps: int) -> Tensor:
    total = torch.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(n_steps), strict=True):
        total += weight / 2 * gradient(model, (node + 1) / 2 * x, k)
    return total * x


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    assert_same(make_method("gradient")(make_model(name), *make_input(name)), one_by_one(gradient, name))


@pytest.mark.parametrize("name", NAMES)
def test_input_x_gradient(name: str) -> None:
    expected = one_by_one(lambda model, x, k: x * gradient(model, x, k), name)
    assert_same(make_method("ixg")(make_model(name), *make_input(name)), expected)


@pytest.mark.parametrize("name", ["bcos_resnet20", "bcos_vit"])
def test_bcos_is_the_contribution_map(name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    maps = make_method("bcos")(model, x, targets)
    model.eval()
    for n in range(len(x)):
        for t, k in enumerate(targets[n].tolist()):
            assert_same(maps[n, t], model.explain(x[n : n + 1], k)["contribution_map"][0])
    model.train()


def test_bcos_equals_the_official_package() -> None:
    model, (x, targets) = make_model("bcos_resnet20"), make_input("bcos_resnet20")
    conv, norm = partial(BcosConv2d, b=2, max_out=2), norms.NoBias(norms.BatchNormUncentered2d)
    official = cifar10_resnet20(pretrained=False, num_classes=10, conv_layer=conv, norm_layer=norm).double().eval()
    official.load_state_dict(model.state_dict(), strict=True)
    maps = make_method("bcos")(model, x, targets)
    for n in range(len(x)):
        for t, k in enumerate(targets[n].tolist()):
            result = official.explain(x[n : n + 1].clone(), k)
            assert_same(maps[n, t], result["contribution_map"][0], 1e-8)


def test_bcos_relative_explains_the_difference_from_the_mean() -> None:
    model, (x, targets) = make_model("bcos_resnet20"), make_input("bcos_resnet20")
    every = torch.arange(10).expand(len(x), -1)
    maps = make_method("bcos")(model, x, every)
    expected = (maps - maps.mean(1, keepdim=True)).gather(1, targets[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    assert_same(make_method("bcos_relative")(model, x, targets), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_integrated_gradients_equals_its_quadrature(name: str, batch_size: int) -> None:
    method = make_method("int_grad", n_steps=4, batch_size=batch_size)
    assert_same(method(make_model(name), *make_input(name)), one_by_one(gauss, name, n_steps=4))


def test_integrated_gradients_equals_captum() -> None:
    def of_captum(model: nn.Module, x: Tensor, k: int) -> Tensor:
        return captum.attr.IntegratedGradients(model).attribute(x, target=k, n_steps=50)

    maps = make_method("int_grad")(make_model("small_conv_net"), *make_input("small_conv_net"))
    assert_same(maps, one_by_one(of_captum, "small_conv_net"), 1e-6)  # captum rounds its weights to float32


def test_integrated_gradients_tends_to_the_integral() -> None:
    name = "small_conv_net"
    maps = make_method("int_grad", n_steps=100)(make_model(name), *make_input(name))
    assert_same(maps, one_by_one(riemann, name, n_steps=200), 0.02)


@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients_sums_to_the_difference_of_logits(name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name, n_images=1)
    sums = make_method("int_grad", n_steps=50, batch_size=64)(model, x, targets).sum((2, 3))
    model.eval()
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, targets).detach()
    model.train()
    assert_same(sums, difference, 0.02)


@pytest.mark.parametrize("name", NAMES)
def test_smooth_grad(name: str) -> None:
    x, _ = make_input(name)
    noise = torch.randn(3, *x[0, :3].shape, generator=torch.Generator().manual_seed(7)).double()

    def slow(model: nn.Module, x: Tensor, k: int) -> Tensor:
        image = x[:, :3]
        deviation = 0.2 * (image.max() - image.min())
        return sum(gradient(model, encode(name, image + deviation * noise[i]), k) for i in range(3)) / 3

    method = make_method("smooth_grad", n_samples=3, noise=0.2, seed=7, batch_size=4)
    assert_same(method(make_model(name), *make_input(name)), one_by_one(slow, name))


def test_smooth_grad_without_noise_is_the_gradient() -> None:
    model, inputs = make_model("small_resnet"), make_input("small_resnet")
    assert_same(
        make_method("smooth_grad", noise=0.0, n_samples=2)(model, *inputs), make_method("gradient")(model, *inputs)
    )


class _GuidedReLU(torch.autograd.Function):
    """The rule by hand: the gradient passes where it and the input are positive."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return output.clamp(min=0) * (x > 0)


@pytest.mark.parametrize("name", ["small_resnet", "small_conv_net", "standard_resnet18"])
def test_guided_backprop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = make_method("guided_backprop")(make_model(name), *make_input(name))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: _GuidedReLU.apply(x))
    assert_same(maps, one_by_one(gradient, name))


def test_deep_lift_equals_captum() -> None:
    def of_captum(model: nn.Module, x: Tensor, k: int) -> Tensor:
        return captum.attr.DeepLift(model).attribute(x, target=k)

    maps = make_method("deep_lift")(make_model("small_conv_net"), *make_input("small_conv_net"))
    with pytest.warns(UserWarning, match="hooks"):
        assert_same(maps, one_by_one(of_captum, "small_conv_net"))


class Reused(nn.Module):
    """One ReLU in two places equals one ReLU for each."""

    def __init__(self, is_reused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.first = nn.ReLU(inplace=True)
        self.second = self.first if is_reused else nn.ReLU()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.conv2(self.first(self.conv1(x)))).mean((2, 3)))


def test_deep_lift_of_a_module_that_is_used_twice() -> None:
    inputs, method = make_input("small_conv_net"), make_method("deep_lift")
    assert_same(method(Reused(True), *inputs), method(Reused(False), *inputs))


@pytest.mark.parametrize("name", ["small_resnet", "small_conv_net", "standard_resnet18"])
def test_deep_lift_sums_to_the_difference_of_logits(name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    sums = make_method("deep_lift")(model, x, targets).sum((2, 3))
    model.eval()
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, targets).detach()
    model.train()
    assert_same(sums, difference)


# Grad-CAM.


def cam_by_hand(model: nn.Module, x: Tensor, k: int) -> Tensor:
    features = model.forward_features(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.forward_head(features)[0, k], features)
    if features.ndim == 3:  # 4x6 patches of 4x4 pixels
        features, slope = (tensor.mT.unflatten(2, (4, 6)) for tensor in (features, slope))
    cam = torch.zeros(features.shape[2:], dtype=x.dtype)
    for c in range(features.shape[1]):
        cam += slope[0, c].sum() * features[0, c].detach()
    cam = cam.clamp(min=0)
    height, width = x.shape[2:]
    rows, columns = cam.shape
    pixels = [[cam[i * rows // height, j * columns // width] for j in range(width)] for i in range(height)]
    return torch.tensor(pixels, dtype=x.dtype)[None, None]


@pytest.mark.parametrize("name", [*NAMES, "standard_resnet18"])
def test_grad_cam(name: str) -> None:
    assert_same(make_method("grad_cam")(make_model(name), *make_input(name)), one_by_one(cam_by_hand, name))


def test_grad_cam_of_an_official_model() -> None:
    """The official procedure: the classifier at each position, then the average."""
    conv, norm = partial(BcosConv2d, b=2, max_out=2), norms.NoBias(norms.BatchNormUncentered2d)
    official = cifar10_resnet20(pretrained=False, num_classes=10, conv_layer=conv, norm_layer=norm).double()
    model = make_model("bcos_resnet20")
    official.load_state_dict(model.state_dict(), strict=True)
    inputs = make_input("bcos_resnet20")
    assert_same(make_method("grad_cam")(official, *inputs), make_method("grad_cam")(model, *inputs))


def test_grad_cam_channels_last() -> None:
    class Last(SmallConvNet):
        num_features = 5

        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x).movedim(1, -1)

        def forward_head(self, x: Tensor) -> Tensor:
            return super().forward_head(x.movedim(-1, 1))

    first = make_model("small_conv_net")
    last = Last().double()
    last.load_state_dict(first.state_dict())
    inputs = make_input("small_conv_net")
    assert_same(make_method("grad_cam")(last, *inputs), make_method("grad_cam")(first, *inputs))


def test_grad_cam_needs_features() -> None:
    with pytest.raises(CannotExplain, match="Sequential doesn't separate its features from its head"):
        make_method("grad_cam")(nn.Sequential(nn.Flatten()), *make_input("small_conv_net"))
