"""Fine-tuning with timm: other heads, learning rates by layer, strides, gradient checkpointing."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from bcos_train.model.grad_checkpointing import CheckpointedBlocks

from .timm_names import ALL, image, on_meta

# ---- the head


def test_without_pooling() -> None:
    """The way in which timm's documentation has the feature map of any model."""
    for own_name, shape in (("bcos_resnet18", (512, 7, 7)), ("bcos_simple_vit_ti_patch16_224", (196, 192))):
        model = on_meta(own_name, num_classes=0, global_pool="")
        assert model(torch.empty(2, 6, 224, 224, device="meta")).shape == (2, *shape)
        assert (model.num_classes, model.global_pool) == (0, "")
        model.reset_classifier(5, "avg")
        assert model(torch.empty(2, 6, 224, 224, device="meta")).shape == (2, 5)
    assert len(on_meta("bcos_resnet18", features_only=True, global_pool="").feature_info.channels()) == 5


def test_pooling_needs_the_classifier_gone() -> None:
    message = "global_pool='' (no average) requires num_classes=0, got 7; with classes, 'avg'"
    with pytest.raises(ValueError, match=re.escape(message)):
        on_meta("bcos_resnet18", global_pool="", num_classes=7)


# ---- groups of parameters


def groups(model: Any, coarse: bool = False) -> dict[int, list[str]]:
    return group_parameters(model, model.group_matcher(coarse))


@pytest.mark.parametrize("coarse", [False, True], ids=["blocks", "stages"])
@pytest.mark.parametrize("own_name", ALL)
def test_groups_go_from_stem_to_head(own_name: str, coarse: bool) -> None:
    model = on_meta(own_name)
    found = groups(model, coarse)
    assert sorted(name for names in found.values() for name in names) == sorted(dict(model.named_parameters()))
    cfg = model.default_cfg
    assert f"{cfg['first_conv']}.weight" in found[0]
    assert f"{cfg['classifier']}.weight" in found[len(found) - 1]
    # The head is a group of its own.
    inside = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert {id(model.get_parameter(name)) for name in found[len(found) - 1]} == inside
    # Groups follow in the order of the forward pass, in which parameters are registered.
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    firsts = [min(order[name] for name in names) for _, names in sorted(found.items())]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("own_name", "timms"),
    [
        ("bcos_resnet18", "resnet18"),
        ("bcos_resnet50", "resnet50"),
        ("bcos_densenet121", "densenet121"),
        ("bcos_convnext_atto", "convnext_atto"),
        ("bcos_convnext_tiny_bnu", "convnext_tiny"),
        ("bcos_vgg11", "vgg11"),
        ("bcos_simple_vit_ti_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_as_many_groups_as_timms_network(own_name: str, timms: str) -> None:
    assert len(groups(on_meta(own_name))) == len(groups(on_meta(timms)))


def shared(names: list[str]) -> set[str]:
    return {".".join(name.split(".")[:3]) for name in names}


def test_layers_between_blocks_belong_to_a_block_group() -> None:
    dense = groups(on_meta("bcos_densenet121"))
    assert shared(dense[6]) == {"features.denseblock1.denselayer6", "features.transition1.norm"} | {
        "features.transition1.conv"
    }
    assert "features.norm5.weight" in dense[len(dense) - 2]
    convnext = groups(on_meta("bcos_convnext_atto"))
    assert shared(convnext[3]) == {"features.3.0", "features.3.1", "features.4.0"}
    vgg = groups(on_meta("bcos_vgg11_bnu"))
    assert [vgg[0], vgg[1]] == [
        ["features.0.linear.weight", "features.1.weight"],
        ["features.3.linear.weight", "features.4.weight"],
    ]


def test_groups_of_other_layers() -> None:
    """They go by the modules' places, not by what a B-cos convolution calls its parts."""
    model = on_meta("bcos_vgg11_bnu", conv_layer=torch.nn.Conv2d)
    assert len(groups(model)) == len(groups(on_meta("bcos_vgg11_bnu")))
    assert len(groups(on_meta("bcos_vgg11_bnu", no_pool=True))) == 9


def test_learning_rates_by_layer() -> None:
    model = timm.create_model("bcos_resnet20")
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    assert scales[id(model.fc.linear.weight)] == 1
    assert scales[id(model.layer3[2].conv1.linear.weight)] == 0.5
    assert scales[id(model.layer3[1].bn2.weight)] == 0.25
    assert scales[id(model.conv1.linear.weight)] == scales[id(model.bn1.weight)] == 0.5**10


# ---- strides


@pytest.mark.parametrize(
    ("own_name", "output_stride", "replaced"),
    [
        ("bcos_resnet50", 32, None),
        ("bcos_resnet50", 16, [False, False, True]),
        ("bcos_resnext50_32x4d", 8, [False, True, True]),
        ("bcos_resnet50", 4, [True, True, True]),
        ("bcos_resnext29_16x8d", 2, [False, True]),
    ],
)
def test_output_stride(own_name: str, output_stride: int, replaced: list[bool] | None) -> None:
    model = on_meta(own_name, output_stride=output_stride)
    assert model.forward_features(torch.empty(1, 6, 64, 64, device="meta")).shape[-1] == 64 // output_stride
    expected = on_meta(own_name, replace_stride_with_dilation=replaced)
    assert str(model) == str(expected)


@pytest.mark.parametrize("own_name", ["bcos_resnet18", "bcos_densenet121", "bcos_vgg11", "bcos_convnext_atto"])
def test_own_stride_is_taken_by_all(own_name: str) -> None:
    assert str(on_meta(own_name, output_stride=32)) == str(on_meta(own_name))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_feature_maps_with_dilation_are_shaped_as_timms(output_stride: int) -> None:
    options = {"features_only": True, "output_stride": output_stride, "out_indices": (1, 2, 3, 4)}
    ours, reference = on_meta("bcos_resnet50", **options), on_meta("resnet50", **options)
    assert ours.feature_info.channels() == reference.feature_info.channels()
    assert ours.feature_info.reduction() == reference.feature_info.reduction()
    mine, theirs = (net(torch.empty(1, c, 96, 64, device="meta")) for net, c in ((ours, 6), (reference, 3)))
    assert [x.shape for x in mine] == [x.shape for x in theirs]


HINT = "; ResNets with bottleneck blocks, such as bcos_resnet50, allow a smaller one"


@pytest.mark.parametrize(
    ("own_name", "options", "message"),
    [
        ("bcos_resnet50", {"output_stride": 12}, "output_stride=12: bcos_resnet50 allows 32, 16, 8 or 4"),
        ("bcos_resnet18", {"output_stride": 16}, f"output_stride=16: bcos_resnet18 allows 32{HINT}"),
        ("bcos_densenet52", {"output_stride": 2}, f"output_stride=2: bcos_densenet52 allows 4{HINT}"),
        (
            "bcos_simple_vit_ti_patch16_224",
            {"output_stride": 16},
            "output_stride=16: bcos_simple_vit_ti_patch16_224 has tokens, not feature maps with a stride",
        ),
        (
            "bcos_resnet50",
            {"output_stride": 16, "replace_stride_with_dilation": [False, False, True]},
            "output_stride and replace_stride_with_dilation have the same effect: set only one of them",
        ),
        (
            "bcos_resnet50",
            {"output_stride": 16, "features_only": True, "out_indices": (5,)},
            "out_indices=(5,): there are 5 feature maps, 0 to 4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_impossible_strides(own_name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        on_meta(own_name, **options)


@pytest.mark.parametrize(
    "own_name", ["bcos_simple_vit_ti_patch16_224", "standard_vitc_ti_patch1_14", "bcos_densenet52", "bcos_vgg11"]
)
def test_networks_without_stochastic_depth(own_name: str) -> None:
    on_meta(own_name, drop_path_rate=0.0)  # timm's scripts may say so
    message = f"drop_path_rate=0.1: {own_name} has no stochastic depth; B-cos ResNets and ConvNeXts have"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        on_meta(own_name, drop_path_rate=0.1)


# ---- less memory


def blocks_of(model: Any) -> Iterator[CheckpointedBlocks]:
    return (module for module in model.modules() if isinstance(module, CheckpointedBlocks))


@pytest.mark.parametrize("own_name", [name for name in ALL if name != "bcos_plain_cnn9"])
def test_grad_checkpointing(own_name: str) -> None:
    model = on_meta(own_name)
    model.set_grad_checkpointing()
    assert {blocks.grad_checkpointing for blocks in blocks_of(model)} == {True}
    model.set_grad_checkpointing(enable=False)
    assert {blocks.grad_checkpointing for blocks in blocks_of(model)} == {False}


def test_grad_checkpointing_of_feature_maps() -> None:
    """Running statistics count each batch once."""
    states = []
    for enable in (False, True):
        torch.manual_seed(0)
        net = timm.create_model("bcos_resnet20", features_only=True)
        net.set_grad_checkpointing(enable)
        sum(out.square().sum() for out in net(image(2, 6, 16, 16))).backward()
        states.append({**dict(net.named_buffers()), **{name: p.grad for name, p in net.named_parameters()}})
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
