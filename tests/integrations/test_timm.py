"""The models in timm's registry."""

import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from bcos_train import create_model, explanation_mode, list_models
from bcos_train.integrations import timm as timm_models
from bcos_train.model import model_signature
from bcos_train.weights import RECORDS
from bcos_train.weights.records import timm_name

from .timm_names import ALL, image, on_meta

#: A small one of each family, and what comes to one position of the last feature map.
FAMILIES = {
    "bcos_resnet18": 32,
    "bcos_resnet20": 4,
    "bcos_densenet121": 32,
    "bcos_densenet52": 4,
    "bcos_vgg11": 32,
    "bcos_convnext_atto": 32,
    "bcos_plain_cnn9": 4,
    "bcos_simple_vit_ti_patch16_224": None,
    "bcos_vitc_ti_patch1_14": None,
    "standard_simple_vit_ti_patch16_224": None,
    "standard_vitc_ti_patch1_14": None,
}
#: 130 million parameters, most of them in the classifier.
LARGE = "bcos_vgg11"
WITH_VALUES = [pytest.param(name, marks=pytest.mark.slow if name == LARGE else ()) for name in FAMILIES]
CONVOLUTIONAL = [name for name, stride in FAMILIES.items() if stride is not None]


# ---- the registry


def test_all_bcos_models_and_official_baselines_are_registered() -> None:
    registered = timm.list_models(module="timm")
    assert set(registered) == set(ALL)
    assert set(timm.list_models("bcos_*")) == {
        f"bcos_{n}" for n in list_models() if not n.startswith(("standard", "timm"))
    }
    assert {own for own in ALL if not own.startswith("bcos_")} == {n for n, row in RECORDS.items() if not row.is_bcos}
    assert all(timm.is_model(name) and timm.model_entrypoint(name).__name__ == name for name in ALL)


def test_rows_of_the_zoo_count_as_pretrained() -> None:
    pretrained = {name for name in timm.list_models(pretrained=True) if name in ALL}
    assert pretrained == {timm_name(name) for name in RECORDS}
    assert timm.is_model_pretrained("bcos_resnet50")
    assert not timm.is_model_pretrained("bcos_resnet20")


def test_registry_entry_of_a_row() -> None:
    cfg = on_meta("bcos_resnet50").default_cfg
    url = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/resnet_50-ead259efe4.pth"
    expected = {"url": url, "architecture": "bcos_resnet50", "license": "apache-2.0", "paper_ids": "arXiv:2306.10898"}
    expected |= {"input_size": (6, 224, 224), "num_classes": 1000, "crop_pct": 0.875, "interpolation": "bilinear"}
    expected |= {"mean": (0, 0, 0), "std": (1, 1, 1), "first_conv": "conv1.linear", "classifier": "fc.linear"}
    assert expected.items() <= cfg.items()
    assert "SHA-256 of the weights begins with ead259efe4" in cfg["notes"][0]
    assert timm.get_pretrained_cfg("bcos_resnet50").url == url
    assert not timm.get_pretrained_cfg("bcos_resnet20").has_weights


@pytest.mark.parametrize("own_name", ALL)
def test_defaults_are_those_of_the_model(own_name: str) -> None:
    model = on_meta(own_name)
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state
    assert cfg["num_classes"] == model.num_classes == model_signature(ALL[own_name]).parameters["num_classes"].default
    assert cfg["input_size"][0] == model.in_chans
    picture = Image.fromarray(np.full((300, 400, 3), 90, dtype=np.uint8))
    if cfg["num_classes"] == 10:
        assert cfg["input_size"][1:] == (32, 32)
        assert model.transform(picture).shape == (6, 300, 400)
    else:
        assert model.transform(picture).shape == cfg["input_size"]
        resized = re.search(r"Resize\(size=\[(\d+)\]", repr(model.transform))
        assert resized is not None
        assert cfg["crop_pct"] == pytest.approx(224 / int(resized[1]), abs=1e-9)


@pytest.mark.parametrize(
    "own_name", ["bcos_resnet18", "bcos_convnext_atto", "bcos_resnet20", "standard_vitc_ti_patch1_14"]
)
def test_timms_transform_returns_the_colors(own_name: str) -> None:
    model = on_meta(own_name)
    size = (32, 32) if own_name == "bcos_resnet20" else (360, 301)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    transform = create_transform(**resolve_model_data_config(model))
    picture = Image.fromarray(pixels)
    torch.testing.assert_close(transform(picture), model.transform(picture)[:3], rtol=0, atol=1e-6)


# ---- building


@pytest.mark.parametrize("own_name", WITH_VALUES)
def test_same_model_as_ours(own_name: str) -> None:
    torch.manual_seed(1)
    a = timm.create_model(own_name, num_classes=7)
    torch.manual_seed(1)
    b = create_model(ALL[own_name], num_classes=7)
    assert type(a) is type(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("own_name", WITH_VALUES)
def test_parts_of_the_forward_pass(own_name: str) -> None:
    """What timm's own tests ask of its models, on an image of 64 x 64 pixels."""
    model = timm.create_model(own_name, num_classes=5).eval()
    x = image(2, model.in_chans, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        before = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert before.shape == (2, model.head_hidden_size)
        stride = FAMILIES[own_name]
        if stride is None:
            assert features.shape[-1] == model.num_features
        else:
            assert features.shape == (2, model.num_features, 64 // stride, 64 // stride)
        assert isinstance(model.get_classifier(), nn.Module)
        model.reset_classifier(0)
        assert model.num_classes == 0
        torch.testing.assert_close(model(x), before)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize("own_name", CONVOLUTIONAL)
def test_pool_size(own_name: str) -> None:
    model = on_meta(own_name)
    features = model.forward_features(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert features.shape[-2:] == model.default_cfg["pool_size"]


@pytest.mark.parametrize("own_name", WITH_VALUES)
def test_without_a_classifier(own_name: str) -> None:
    model = timm.create_model(own_name, num_classes=0).eval()
    with torch.no_grad():
        assert model(image(1, model.in_chans, 64, 64)).shape == (1, model.head_hidden_size)


def test_every_parameter_learns() -> None:
    model = timm.create_model("bcos_resnet20", num_classes=42)
    model(image(2, 6, 32, 32)).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_input_channels() -> None:
    model = timm.create_model("bcos_resnet20", in_chans=4)
    assert model(image(1, 4, 32, 32)).shape == (1, 10)


def test_explanations() -> None:
    model = timm.create_model("bcos_resnet20").eval()
    assert set(model.explain(image(1, 6, 32, 32))) >= {"prediction", "dynamic_linear_weights", "contribution_map"}


# ---- what timm hands on


def test_arguments_of_the_entry_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm keeps its own settings to itself, and drops those that are None."""
    seen: dict[str, Any] = {}

    def record(name: str, pretrained: bool, **options: Any) -> nn.Module:
        seen.update(options, name=name, pretrained=pretrained)
        return nn.Identity()

    monkeypatch.setattr(timm_models, "_create", record)
    timm.create_model(
        "bcos_resnet20", scriptable=True, exportable=True, no_jit=True, checkpoint_path="", drop_block_rate=None
    )
    assert seen.pop("name") == "resnet20"
    assert seen == {"pretrained": False, "pretrained_cfg": None, "pretrained_cfg_overlay": None, "cache_dir": None}


def test_what_timms_training_script_passes() -> None:
    """It names rates and pooling for every model."""
    model = timm.create_model("bcos_resnet20", drop_rate=0.0, drop_path_rate=0.2, global_pool="avg", in_chans=6)
    assert "p=0.2" in str(model.layer3[-1].stochastic_depth)
    model = timm.create_model("bcos_densenet52", drop_rate=0.3)
    assert model.features.denseblock1.denselayer1.drop_rate == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features_onli": True}, "bcos_resnet20 has no option 'features_onli'; did you mean features_only?"),
        ({"normlayer": "bn"}, "bcos_resnet20 has no option 'normlayer'; did you mean norm_layer?"),
        ({"img_size": 64}, "bcos_resnet20 has no option 'img_size'"),
        ({"drop_rate": 0.5}, "drop_rate=0.5: bcos_resnet20 has no dropout before its classifier"),
        ({"global_pool": "max"}, "global_pool='max': 'avg', or with num_classes=0 '' for no average"),
        ({"out_indices": (1,)}, "out_indices=(1,) needs features_only=True"),
        ({"features_only": True, "out_indices": (0, 3)}, "out_indices=(0, 3): there are 3 feature maps, 0 to 2"),
        ({"features_only": True, "out_indices": 4}, "out_indices=4: there are 3 feature maps, 0 to 2"),
        ({"features_only": True, "out_indices": ()}, "out_indices=(): there are 3 feature maps, 0 to 2"),
        ({"features_only": True, "feature_cls": "fx"}, "feature_cls='fx': one of list, dict, hook"),
        ({"num_classes": -1}, "num_classes=-1: at least 0"),
        ({"pretrained": True}, "resnet20"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        timm.create_model("bcos_resnet20", **options)
    assert "\n" not in str(caught.value)


def test_transformers_have_no_feature_maps() -> None:
    with pytest.raises(
        ValueError, match="features_only=True: BcosSimpleViT has no feature maps at several resolutions"
    ):
        timm.create_model("bcos_simple_vit_ti_patch16_224", features_only=True)


# ---- features_only


@pytest.mark.parametrize(
    ("own_name", "timms"),
    [
        ("bcos_resnet18", "resnet18"),
        ("bcos_resnet50", "resnet50"),
        ("bcos_resnext50_32x4d", "resnext50_32x4d"),
        ("bcos_densenet121", "densenet121"),
        ("bcos_convnext_atto", "convnext_atto"),
        ("bcos_convnext_tiny_bnu", "convnext_tiny"),
        ("bcos_vgg11_bnu", "vgg11_bn"),
    ],
)
def test_feature_maps_are_shaped_as_timms(own_name: str, timms: str) -> None:
    ours, reference = on_meta(own_name, features_only=True), on_meta(timms, features_only=True)
    assert ours.feature_info.channels() == reference.feature_info.channels()
    assert ours.feature_info.reduction() == reference.feature_info.reduction()
    assert len(ours.feature_info.module_name()) == len(set(ours.feature_info.module_name()))
    for height, width in ((224, 224), (97, 65), (255, 129)):
        mine = ours(torch.empty(1, 6, height, width, device="meta"))
        theirs = reference(torch.empty(1, 3, height, width, device="meta"))
        assert [tuple(x.shape) for x in mine] == [tuple(x.shape) for x in theirs]


@pytest.mark.parametrize(
    ("own_name", "channels"),
    [("bcos_resnet20", [16, 32, 64]), ("bcos_densenet52", [120, 156, 174]), ("bcos_plain_cnn9", [64, 128, 256])],
)
def test_feature_maps_of_networks_for_small_images(own_name: str, channels: list[int]) -> None:
    net = timm.create_model(own_name, features_only=True)
    assert net.feature_info.channels() == channels
    assert net.feature_info.reduction() == [1, 2, 4]
    assert [tuple(x.shape[1:]) for x in net(image(1, 6, 32, 32))] == [
        (n, 32 // r, 32 // r) for n, r in zip(channels, (1, 2, 4), strict=True)
    ]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook"])
@pytest.mark.parametrize("own_name", ["bcos_resnet18", "bcos_densenet52", "bcos_convnext_atto"])
def test_feature_maps_equal_those_of_the_model(own_name: str, feature_cls: str) -> None:
    torch.manual_seed(2)
    model = timm.create_model(own_name).eval()
    torch.manual_seed(2)
    net = timm.create_model(own_name, features_only=True, feature_cls=feature_cls).eval()
    x, seen = image(1, 6, 64, 64), {}
    for name in net.feature_info.module_name():
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        maps = net(x)
        model(x)
        last = model.forward_features(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert len(maps) == len(seen)
    for a, b in zip(maps, seen.values(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(maps[-1], last)


@pytest.mark.parametrize(("out_indices", "channels"), [((1, 3), [64, 256]), (2, [256, 512]), ((-2,), [256])])
def test_some_of_the_feature_maps(out_indices: Any, channels: list[int]) -> None:
    net = timm.create_model("bcos_resnet18", features_only=True, out_indices=out_indices)
    assert net.feature_info.channels() == channels == [x.shape[1] for x in net(image(1, 6, 64, 64))]


def test_building_features_leaves_no_trace() -> None:
    """Measuring the channels leaves mode and running statistics alone."""
    torch.manual_seed(0)
    net = timm.create_model("bcos_resnet18", features_only=True)
    torch.manual_seed(0)
    state = create_model("resnet18").state_dict()
    assert net.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(parameter.grad is not None for parameter in net.parameters())
    assert "num_classes" not in net.default_cfg
    assert net.default_cfg["input_size"] == (6, 224, 224)


def test_explanation_mode_reaches_the_features() -> None:
    """The sum of a feature map is then a linear map of the image."""
    net = timm.create_model("bcos_resnet20", features_only=True).eval().double()
    x = image(1, 6, 16, 16).double().requires_grad_()
    with explanation_mode(net):
        out = net(x)[-1].sum()
        (weights,) = torch.autograd.grad(out, x)
    torch.testing.assert_close((weights * x).sum(), out)


def test_configuration_is_returned() -> None:
    """As timm's own scripts do, which resolve the configuration first."""
    cfg = on_meta("bcos_resnet18").pretrained_cfg
    assert on_meta("bcos_resnet18", pretrained_cfg=cfg).pretrained_cfg == cfg
