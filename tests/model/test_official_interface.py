"""Code written for the official networks: it walks children and slices sequences."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_models
import official_vits
import pytest
import torch
from torch import Tensor, nn

from bcos_train import create_model

ROOT = Path(__file__).parents[2]
#: One of each family.
NAMES = [
    "resnet18",
    "resnet50",
    "resnet20",
    "resnext50_32x4d",
    "densenet121",
    "vgg11",
    "vgg11_bnu",
    "convnext_tiny",
    "convnext_tiny_bnu",
    "simple_vit_ti_patch16_224",
    "vitc_ti_patch1_14",
]
#: Children of the official modules that ours don't have: attention is one fused operation.
MISSING = {"attend"}
#: Our names of the official classes.
KINDS = {
    "CNBlock": "ConvNeXtBlock",
    "PosEmbSinCos2d": "PositionalEmbedding",
    "BcosSequential": "BcosSimpleViT",
    "Transformer": "CheckpointedBlocks",
    "Rearrange": "Patches",
    "_DenseBlock": "DenseBlock",
    "_DenseLayer": "DenseLayer",
    "_Transition": "Sequential",
}


def build(name: str) -> tuple[Any, Any]:
    builder = official_vits.build_official if "vit" in name else official_models.build_official
    return create_model(name), builder(name)


def assert_same_tree(ours: nn.Module, official: nn.Module, path: str = "model") -> None:
    kind = KINDS.get(type(official).__name__, type(official).__name__)
    assert kind in {base.__name__ for base in type(ours).__mro__}, f"{path}: {type(ours)} is not {type(official)}"
    theirs = {name: child for name, child in official.named_children() if name not in MISSING}
    assert [name for name, _ in ours.named_children()] == list(theirs), path
    for name, child in ours.named_children():
        assert_same_tree(child, theirs[name], f"{path}.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_children_are_the_official_ones_in_the_same_order(name: str) -> None:
    with torch.device("meta"):
        assert_same_tree(*build(name))


def without_head(model: Any) -> nn.Module:
    """The usual way to get features: all children but average, classifier and logit layer."""
    last = {"fc": 3, "classifier": 2}
    (n,) = (n for head, n in last.items() if hasattr(model, head))
    n += n == 2 and hasattr(model, "avgpool")
    return nn.Sequential(*list(model.children())[:-n])


SLICES: list[tuple[str, Callable[[Any], Any]]] = [
    ("resnet18", without_head),
    ("resnet18", lambda model: nn.Sequential(*list(model.children())[:-1])),
    ("resnet18", lambda model: nn.Sequential(model.conv1, model.pool, model.bn1, model.layer1[:1])),
    ("resnet20", without_head),
    ("densenet121", without_head),
    ("densenet121", lambda model: nn.Sequential(*model.children())),
    ("densenet121", lambda model: model.features[:6]),
    ("convnext_tiny", without_head),
    ("convnext_tiny", lambda model: model.features[:3]),
    ("simple_vit_ti_patch16_224", lambda model: model[0].to_patch_embedding),
    ("simple_vit_ti_patch16_224", lambda model: model[:1]),
    ("simple_vit_ti_patch16_224", lambda model: nn.Sequential(*model)),
]


@pytest.mark.parametrize(("name", "part"), SLICES)
def test_slices_compute_the_same(name: str, part: Callable[[Any], Any]) -> None:
    ours, official = build(name)
    official.load_state_dict(ours.state_dict())
    x = official_models.images(64 if "vit" not in name else 224)
    outputs: list[Tensor] = []
    for model in (ours, official):
        # With batch statistics, since those of a new network don't fit: its activations fade.
        module = part(model).train()
        for layer in module.modules():
            if type(layer).__name__ == "StochasticDepth":
                layer.eval()
        with torch.no_grad():
            outputs.append(module(x))
    assert official_models.relative_error(*outputs) < 1e-4


ATTRIBUTES = (
    "stride",
    "inplanes",
    "dilation",
    "groups",
    "base_width",
    "scale",
    "patch_dim",
    "expansion",
    "output_size",
)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet20", "simple_vit_ti_patch16_224"])
def test_attributes_have_the_official_values(name: str) -> None:
    with torch.device("meta"):
        ours, official = build(name)
    modules = dict(ours.named_modules())
    for path, module in official.named_modules():
        for key in ATTRIBUTES:
            if path in modules and key in vars(module):
                assert getattr(modules[path], key) == getattr(module, key), f"{path}.{key}"


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "resnet20", "densenet121", "vgg11_bnu", "convnext_atto", "vitc_ti_patch1_14"]
)
def test_missing_attributes_are_on_the_migration_page(name: str) -> None:
    page = (ROOT / "TRAINING.md").read_text(encoding="utf-8").partition("\n## Coming from the official code\n")[2]
    with torch.device("meta"):
        ours, official = build(name)
    modules, common = dict(ours.named_modules()), set(dir(nn.Module()))
    missing = {
        attribute
        for path, module in official.named_modules()
        if path in modules
        for attribute in set(dir(module)) - common
        if not attribute.startswith("_") and not hasattr(modules[path], attribute)
    }
    assert [attribute for attribute in sorted(missing) if not re.search(rf"`[^`]*\b{attribute}(\(\))?`", page)] == []
