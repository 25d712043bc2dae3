"""Nine-layer network of the first paper, against a network of the official layers."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bcos.modules.bcosconv2d import BcosConv2dWithScale
from bcos.modules.logitlayer import LogitLayer
from official_models import images, relative_error
from PIL import Image
from torch import nn

from bcos_train import create_model, explain
from bcos_train.config import instantiate
from bcos_train.config.composition import Composer
from bcos_train.loss import BinaryCrossEntropy

#: B -> layer scale and logit temperature, worked out from the authors' experiment parameters.
PAPER = {
    1: (1.7782794100389228, 0.001),
    1.25: (0.7498942093324559, 0.001),
    1.5: (0.31622776601683794, 0.01),
    1.75: (0.1333521432163324, 10.0),
    2: (0.056234132519034905, 100.0),
    2.25: (0.023713737056616554, 100.0),
    2.5: (0.01, 1000.0),
}


def reference(b: float, max_out: int = 2) -> Any:
    """Reference network: nine scaled layers in sequence, average over positions, temperature and bias."""
    scale, temperature = PAPER[b]
    channels = [6, 64, 64, 128, 128, 128, 256, 256, 256, 10]
    kernels, strides = [3] * 8 + [1], [1, 1, 2, 1, 1, 2, 1, 1, 1]
    layers: list[nn.Module] = [
        BcosConv2dWithScale(
            channels[i], channels[i + 1], kernels[i], strides[i], kernels[i] // 2, b=b, max_out=max_out, scale=scale
        )
        for i in range(9)
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), LogitLayer(temperature, math.log(0.1 / 0.9)))
    return nn.Sequential(*layers, *head)


@pytest.mark.filterwarnings("ignore:BcosConv2dWithScale is deprecated")
@pytest.mark.parametrize("b", PAPER)
def test_equals_the_official_layers(b: float) -> None:
    torch.manual_seed(3)
    official = reference(b)
    torch.manual_seed(3)
    ours = create_model("plain_cnn9", b=b)
    expected = official.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())

    x = images(32)
    with torch.no_grad():
        logits, official_logits = ours(x), official(x)
    assert relative_error(logits, official_logits) < 1e-5
    assert relative_error(logits - ours.logit_layer.logit_bias, official_logits - math.log(0.1 / 0.9)) < 1e-4

    x.requires_grad_()
    for module in official[:9]:
        module.set_explanation_mode(True)
    official(x)[:, 4].sum().backward()
    assert relative_error(explain(ours.eval(), x, 4).weights, x.grad) < 1e-4


def test_shape_of_the_network() -> None:
    model = create_model("plain_cnn9")
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_772_160
    assert (model.num_classes, model.in_chans, model.num_features, model.head_hidden_size) == (10, 6, 256, 256)
    assert model.logit_layer.logit_bias == pytest.approx(math.log(0.1 / 0.9), rel=1e-12)
    assert model.transform(Image.new("L", (32, 32))).shape == (6, 32, 32)


@pytest.mark.parametrize("b", PAPER)
def test_logit_is_linear_in_the_input(b: float) -> None:
    torch.manual_seed(0)
    model = create_model("plain_cnn9", b=b, num_classes=4).double().eval()
    x = images(32, dtype=torch.float64)
    result = explain(model, x)
    parts = (x * result.weights).sum((1, 2, 3))
    assert relative_error(parts, result.logits.amax(1) + math.log(3)) < 1e-10
    assert parts.abs().min() > 0


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (32, 32), (64, 33)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    model = create_model("plain_cnn9").eval()
    x = torch.rand(2, 6, *size)
    assert model.forward_features(x).shape == (2, 256, -(-size[0] // 4), -(-size[1] // 4))
    assert model(x).shape == (2, 10)


def test_scale_and_temperature_can_be_given() -> None:
    torch.manual_seed(0)
    model = create_model("plain_cnn9", b=3, layer_scale=0.5, logit_temperature=2.0, logit_bias=0.0).eval()
    x = images(16)
    out = x
    with torch.no_grad():
        for index in range(9):
            layer = getattr(model, str(index))
            assert (layer.b, layer.scale) == (3, 0.5)
            out = layer(out)
        assert relative_error(model(x), out.mean((2, 3)) / 2) < 1e-6
    for option in ("layer_scale", "logit_temperature"):
        alone = create_model("plain_cnn9", b=2.5, **{option: 7.0})
        expected = {"layer_scale": PAPER[2.5][0], "logit_temperature": PAPER[2.5][1]} | {option: 7.0}
        found = {"layer_scale": getattr(alone, "0").scale, "logit_temperature": alone.logit_layer.logit_temperature}
        assert found == pytest.approx(expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown b": ({"b": 3}, r"b=3: .* defaults for b = 1, 1\.25, 1\.5, 1\.75, 2, 2\.25 and 2\.5; set both"),
    "scale alone": ({"b": 1.3, "layer_scale": 1.0}, r"b=1\.3: .* set both"),
    "temperature alone": ({"b": 1.3, "logit_temperature": 1.0}, r"b=1\.3: .* set both"),
    "scale": ({"layer_scale": 0.0}, r"layer_scale=0\.0: expected a finite number > 0"),
    "temperature": ({"logit_temperature": 0.0}, r"logit_temperature=0\.0"),
    "b": ({"b": 0.5, "layer_scale": 1.0, "logit_temperature": 1.0}, r"b=0\.5"),
    "no class": ({"num_classes": 0}, "num_classes=0: at least 1"),
    "option": ({"scale": 1.0}, r"plain_cnn9 has no option 'scale'; did you mean layer_scale\?"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("plain_cnn9", **options)


def test_a_new_classifier_keeps_scale_and_temperature() -> None:
    model = create_model("plain_cnn9", b=1.75).eval()
    x = images(16)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert getattr(model, "8").scale == getattr(model, "0").scale
    assert (model.logit_layer.logit_temperature, model.logit_layer.logit_bias) == (10.0, -math.log(2))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)


def test_copies_are_independent() -> None:
    model = create_model("plain_cnn9").eval()
    twin, x = copy.deepcopy(model), images(16)
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


# The recipe, against the authors' experiment parameters.


def composed(*overrides: str) -> dict[str, Any]:
    return Composer(Path(__file__).parents[2] / "configs").compose("train", overrides)


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/data")
    config = composed("model=plain_cnn9", "dataset=cifar10")
    assert config["name"] == "plain_cnn"
    assert (config["trainer"]["max_epochs"], config["batch_size"]) == (100, 64)
    assert config["trainer"]["gradient_clip_val"] is None
    assert config["ema"] is None
    schedule, lr = instantiate(config["schedule"]), config["optimizer"]["lr"]
    rates = [schedule.lr(782 * epoch + 781, 782, lr) for epoch in range(100)]
    assert rates == pytest.approx([1e-3 * math.cos(math.pi * i / 200) + 1e-5 for i in range(100)], rel=1e-9)
    optimizer = instantiate(config["optimizer"])([torch.zeros(1, requires_grad=True)])
    assert (
        optimizer.param_groups[0] | {"lr": 0}
        == torch.optim.Adam(optimizer.param_groups[0]["params"], lr=0).param_groups[0]
    )
    for key in ("loss", "eval_loss"):
        loss = instantiate(config[key])
        assert isinstance(loss, BinaryCrossEntropy)
        assert (loss.smoothing, loss.target_threshold) == (0.0, None)
    flip, crop, _ = instantiate(config["augmentation"]).train.transforms
    assert (flip.p, crop.size, crop.padding) == (0.5, (32, 32), [4] * 4)


@pytest.mark.parametrize("b", PAPER)
def test_rows_of_the_recipe(b: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/data")
    config = composed("model=plain_cnn9", "dataset=cifar10", f"model.b={b}")
    model = instantiate(config["model"])(num_classes=10)
    assert getattr(model, "8").b == b
    assert (getattr(model, "8").max_out, getattr(model, "8").scale) == (2, pytest.approx(PAPER[b][0]))
    assert model.logit_layer.logit_temperature == PAPER[b][1]
