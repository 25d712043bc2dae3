import re
from importlib.metadata import metadata

import pytest
import torch

from bcos_train import create_model, list_models
from bcos_train.weights import RECORDS, find_record

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "vgg11_bnu",
    "convnext_tiny",
    "convnext_base",
    "convnext_tiny_bnu",
    "convnext_base_bnu",
    "densenet121_long",
    "resnet50_long",
    "resnet152_long",
    "simple_vit_ti_patch16_224",
    "simple_vit_s_patch16_224",
    "simple_vit_b_patch16_224",
    "simple_vit_l_patch16_224",
    "vitc_ti_patch1_14",
    "vitc_s_patch1_14",
    "vitc_b_patch1_14",
    "vitc_l_patch1_14",
    "standard_simple_vit_ti_patch16_224",
    "standard_simple_vit_s_patch16_224",
    "standard_simple_vit_b_patch16_224",
    "standard_simple_vit_l_patch16_224",
    "standard_vitc_ti_patch1_14",
    "standard_vitc_s_patch1_14",
    "standard_vitc_b_patch1_14",
    "standard_vitc_l_patch1_14",
]


def test_names_in_the_published_order() -> None:
    assert list(RECORDS) == NAMES
    assert len(NAMES) == 34
    assert set(list_models(pretrained=True)) == set(NAMES)
    assert list_models("resnet1*", pretrained=True) == ["resnet18", "resnet101", "resnet152", "resnet152_long"]


def published() -> dict[str, tuple[float, float, float, str]]:
    """Top-1, top-5, millions of parameters and the address, from the table in the official package's description."""
    text = metadata("bcos").get_payload()
    pattern = r"^\| `(\w+)` +\| ([\d.]+)% +\| ([\d.]+)% +\| ([\d.]+)M +\| \[link\]\((\S+)\) +\|"
    rows = re.findall(pattern, text, re.MULTILINE)
    return {name: (float(top1), float(top5), float(params), url) for name, top1, top5, params, url in rows}


def test_published_values() -> None:
    ours = {name: (row.top1, row.top5, row.params_published_m, row.url) for name, row in RECORDS.items()}
    assert ours == published()


@pytest.mark.parametrize("name", NAMES)
def test_experiment_is_the_official_one(name: str) -> None:
    from bcos.models import pretrained

    row = find_record(name)
    assert row.url == pretrained.URLS[row.collection][row.experiment]
    assert re.fullmatch("[0-9a-f]{10}", row.sha256)
    assert row.url.endswith(f"-{row.sha256}.pth")


@pytest.mark.parametrize("name", NAMES)
def test_exact_counts_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    row = find_record(name)
    assert sum(p.numel() for p in model.parameters()) == row.params
    assert len(model.state_dict()) == row.n_state_dict_entries


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'resnet-50'; did you mean resnet50\?"):
        find_record("resnet-50")


def test_known_model_without_official_weights() -> None:
    with pytest.raises(ValueError, match=r"^resnet20 has no official weights; near it, resnet"):
        find_record("resnet20")


@pytest.mark.parametrize("name", RECORDS)
def test_preset_equals_the_transform_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    resize, crop, *_ = model.transform.geometry.transforms
    assert (resize.size, crop.size) == ([RECORDS[name].resize_size], (RECORDS[name].crop_size,) * 2)
