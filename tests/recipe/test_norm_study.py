"""The CIFAR-10 recipes against the official norm study, value by value."""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from bcos.experiments.CIFAR10.norm_ablations_final.experiment_parameters import CONFIGS as NORM_STUDY
from comparing import Config, assert_same_recipe
from composing import compose
from torch import nn

from bcos_train import create_model
from bcos_train.config import instantiate
from bcos_train.config.containers import overlay
from bcos_train.nn import make_norm


def norm_facts(make: Callable[[int], nn.Module]) -> dict[str, Any]:
    """Return the class, options, parameter shapes and state-dict keys of a norm layer."""
    norm = make(8)
    numbers = {
        key: value for key in ("eps", "momentum", "num_groups") if (value := getattr(norm, key, None)) is not None
    }
    shapes = {key: None if value is None else tuple(value.shape) for key, value in norm._parameters.items()}
    return {"class": type(norm).__name__, **numbers, **shapes, "state": list(norm.state_dict())}


@cache
def our_norm_facts(name: str) -> dict[str, Any]:
    return norm_facts(make_norm(name))


@cache
def our_logit_bias(name: str, num_classes: int) -> float:
    with torch.device("meta"):
        model: Any = create_model(name, num_classes=num_classes)
    return model.logit_layer.logit_bias


def assert_same_model(ours: Config, official: Config) -> None:
    options, args = ours["model"], official["model"]["args"]
    assert options["name"] == official["model"]["name"]
    assert official["model"]["is_bcos"]
    assert set(args) <= {"num_classes", "norm_layer", "logit_bias", "stochastic_depth_prob"}
    assert our_norm_facts(options["norm_layer"]) == norm_facts(args["norm_layer"])
    assert {"b": options["b"], "max_out": options["max_out"]} == official["model"]["bcos_args"]
    assert options.get("stochastic_depth_prob", 0.0) == args.get("stochastic_depth_prob", 0.0)
    num_classes = args["num_classes"]
    assert num_classes == official["data"]["num_classes"]
    assert our_logit_bias(options["name"], num_classes) == args["logit_bias"] == -math.log(num_classes - 1)
    assert set(options) <= {"_target_", "_partial_", "name", "norm_layer", "b", "max_out", "stochastic_depth_prob"}


def test_rows() -> None:
    assert len(NORM_STUDY) == 4 * (1 + 36) * 2 * 3


def study_overrides(name: str) -> tuple[str, list[str]]:
    """The depth and the command line for an experiment such as `resnet_20_bnu-linear-nomaxout-seed=420`."""
    found = re.fullmatch(r"resnet_(\d+)(?:_([a-z]+(?:-linear|-unaffine)?))?(-nomaxout)?(?:-(seed=\d+))?", name)
    assert found, name
    depth, norm, single, seed = found.groups()
    overrides = [f"model.norm_layer={norm or 'none'}", f"model.max_out={1 if single else 2}"]
    return depth, overrides + ([seed] if seed else [])


def study_config(name: str) -> Config:
    """Composed once for each depth; the values of plain keys are then set as the command line would."""
    depth, overrides = study_overrides(name)
    config = compose(f"model=resnet{depth}", "dataset=cifar10")
    changes: Config = {"model": {}}
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, last = key.split(".")
        (changes[parents[0]] if parents else changes)[last] = int(text) if text.isdigit() else text
    return overlay(config, changes, [override.partition("=")[0] for override in overrides])


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_norm_study(depth: int) -> None:
    names = [name for name in NORM_STUDY if name.startswith(f"resnet_{depth}")]
    assert len(names) == 222
    for name in names:
        ours, official = study_config(name), NORM_STUDY[name]
        try:
            assert_same_model(ours, official)
            assert ours["seed"] == official.get("seed", 42)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    # The rest is shared.
    for name in (f"resnet_{depth}", f"resnet_{depth}_bnu-linear", f"resnet_{depth}_an-nomaxout-seed=420"):
        assert_same_recipe(study_config(name), NORM_STUDY[name], gpus=1)


def test_norm_study_shares_all_but_the_model_and_the_seed() -> None:
    reference = NORM_STUDY["resnet_20"]
    for name, config in NORM_STUDY.items():
        for key in reference.keys() - {"model"}:
            # repr: the parts are objects that know no equality.
            assert repr(config[key]) == repr(reference[key]), (name, key)
        assert config.keys() - {"seed"} == reference.keys()


@pytest.mark.parametrize(
    "name", ["resnet_20", "resnet_56_pn", "resnet_44_gnu-unaffine-nomaxout-seed=1337", "resnet_32_inu-linear-seed=420"]
)
def test_norm_study_from_the_command_line(name: str) -> None:
    depth, overrides = study_overrides(name)
    assert compose(f"model=resnet{depth}", "dataset=cifar10", *overrides) == study_config(name)


def test_cifar10_defaults_are_a_row_of_the_study() -> None:
    assert compose("model=resnet20", "dataset=cifar10") == study_config("resnet_20_bnu-linear")


def test_cifar10_transforms() -> None:
    ours = instantiate(compose("model=resnet20", "dataset=cifar10")["augmentation"])
    data = NORM_STUDY["resnet_20"]["data"]
    flip, crop, to_tensor, inverse = data["train_transform"].transforms.transforms
    our_flip, our_crop, _ = ours.train.transforms
    assert [type(step).__name__ for step in (flip, crop, to_tensor, inverse)] == [
        *("RandomHorizontalFlip", "RandomCrop", "ToTensor", "AddInverse")
    ]
    assert our_flip.p == flip.p
    assert (our_crop.size, our_crop.padding) == (tuple(crop.size), [crop.padding] * 4)
    assert (our_crop.fill, our_crop.padding_mode) == (crop.fill, crop.padding_mode)
    assert [type(step).__name__ for step in data["test_transform"].transforms.transforms] == ["ToTensor", "AddInverse"]
    assert [type(step).__name__ for step in ours.eval.transforms] == ["PILToTensor"]


def test_number_of_classes_of_the_studies() -> None:
    dataset = instantiate(compose("dataset=cifar10")["dataset"])
    assert dataset.num_classes == NORM_STUDY["resnet_20"]["data"]["num_classes"]
