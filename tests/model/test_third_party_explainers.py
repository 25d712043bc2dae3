"""Explanation tools written for any network give on ours what they give on the official one with the same weights."""

import contextlib
from collections.abc import Callable

import captum.attr
import numpy as np
import pytest
import torch
from official_models import build_official, calibrate_, images, perturb_, relative_error
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.explanation import explanation_mode

TARGET = 3


def pair(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Our network and the official one, with the same weights and statistics."""
    torch.manual_seed(0)
    ours = create_model(name, logit_bias=0.0)
    perturb_(ours)
    calibrate_(ours, images(size, n=8))
    official = build_official(name)
    official.load_state_dict(ours.state_dict())
    if hasattr(official, "logit_layer"):
        official.logit_layer.logit_bias = None
    return ours.double().eval(), official.double().eval()


METHODS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "saliency": lambda model, x: captum.attr.Saliency(model).attribute(x, TARGET),
    "input x gradient": lambda model, x: captum.attr.InputXGradient(model).attribute(x, TARGET),
    "integrated gradients": lambda model, x: captum.attr.IntegratedGradients(model).attribute(
        x, target=TARGET, n_steps=4
    ),
    "guided backprop": lambda model, x: captum.attr.GuidedBackprop(model).attribute(x, TARGET),
    "deconvolution": lambda model, x: captum.attr.Deconvolution(model).attribute(x, TARGET),
    "DeepLIFT": lambda model, x: captum.attr.DeepLift(model).attribute(x, torch.zeros_like(x), target=TARGET),
    "GradientSHAP": lambda model, x: captum.attr.GradientShap(model).attribute(
        x, baselines=torch.zeros_like(x), n_samples=2, target=TARGET
    ),
    "SmoothGrad": lambda model, x: captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(
        x, nt_samples=2, target=TARGET
    ),
    "occlusion": lambda model, x: captum.attr.Occlusion(model).attribute(
        x, (6, 8, 8), strides=(6, 8, 8), target=TARGET
    ),
    "feature ablation": lambda model, x: captum.attr.FeatureAblation(model).attribute(
        x, target=TARGET, feature_mask=torch.arange(16).repeat_interleave(16).view(1, 1, 16, 16)
    ),
    "Grad-CAM": lambda model, x: captum.attr.LayerGradCam(model, model.get_submodule("layer3")).attribute(x, TARGET),
}


@pytest.mark.parametrize("is_explaining", [False, True], ids=["plain", "explanation mode"])
@pytest.mark.parametrize("method", METHODS)
def test_captum(method: str, is_explaining: bool) -> None:
    ours, official = pair("resnet20", 16)
    x = images(16, dtype=torch.float64)
    results = []
    for model, mode in ((ours, explanation_mode(ours)), (official, official.explanation_mode())):
        torch.manual_seed(0)
        np.random.seed(0)  # GradientSHAP draws from it
        with mode if is_explaining else contextlib.nullcontext():
            results.append(METHODS[method](model, x.clone().requires_grad_()).detach())
    assert results[1].abs().max() > 0
    assert relative_error(*results) <= 1e-9


def watch(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return output and gradient of each module, collected as pytorch-grad-cam does."""
    outputs, gradients = {}, {}

    def hook(name: str, output: Tensor) -> None:
        outputs[name] = output.detach().clone()
        output.register_hook(lambda gradient: gradients.update({name: gradient.clone()}))

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: hook(name, output))  # type: ignore[misc]
        for name, module in model.named_modules()
    ]
    model(x)[:, TARGET].sum().backward()
    for handle in handles:
        handle.remove()
    return {name: (outputs[name], gradients[name]) for name in outputs}


@pytest.mark.parametrize("name", ["resnet20", "resnext29_32x4d"])
def test_activations_and_gradients_of_every_layer(name: str) -> None:
    """All methods of the CAM family are functions of these."""
    ours, official = (watch(model, images(16, dtype=torch.float64)) for model in pair(name, 16))
    assert official.keys() <= ours.keys()
    for module in official:
        for mine, theirs in zip(ours[module], official[module], strict=True):
            assert relative_error(mine, theirs) <= 1e-9, module
