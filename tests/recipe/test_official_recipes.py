"""The recipes against the official experiments, value by value."""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from bcos.experiments.CIFAR10.norm_ablations_final.experiment_parameters import CONFIGS as NORM_STUDY
from bcos.experiments.ImageNet.baseline.experiment_parameters import CONFIGS as BASELINE
from bcos.experiments.ImageNet.bcos_final.experiment_parameters import CONFIGS as BCOS_FINAL
from bcos.experiments.ImageNet.bcos_final_long.experiment_parameters import CONFIGS as BCOS_FINAL_LONG
from bcos.modules.losses import BinaryCrossEntropyLoss, UniformOffLabelsBCEWithLogitsLoss
from composing import compose
from torch import nn

from bcos_train import create_model
from bcos_train.config import instantiate
from bcos_train.config.plain import overlay
from bcos_train.loss import BinaryCrossEntropy, CrossEntropy, UniformOffLabelBinaryCrossEntropy
from bcos_train.nn import make_norm

Config = dict[str, Any]

LOSSES: dict[type, tuple[type, Callable[[Any], Any]]] = {
    BinaryCrossEntropyLoss: (BinaryCrossEntropy, lambda loss: (loss.smoothing, loss.target_threshold)),
    UniformOffLabelsBCEWithLogitsLoss: (UniformOffLabelBinaryCrossEntropy, lambda loss: loss.off_label),
    nn.CrossEntropyLoss: (
        CrossEntropy,
        lambda loss: getattr(loss, "label_smoothing", getattr(loss, "smoothing", None)),
    ),
}


def assert_same_recipe(ours: Config, official: Config, gpus: int) -> None:
    """All but the transforms and the seed, which the callers compare."""
    assert ours["trainer"]["max_epochs"] == official["trainer"]["max_epochs"]
    accumulate = official["trainer"].get("accumulate_grad_batches", 1)
    assert ours["batch_size"] == official["data"]["batch_size"] * accumulate * gpus
    assert set(official["trainer"]) <= {"max_epochs", "accumulate_grad_batches"}
    assert ours["seed"] == official.get("seed", 42)
    assert_same_optimizer(ours, official)
    assert_same_rates(ours, official)
    for key, official_key in (("loss", "criterion"), ("eval_loss", "test_criterion")):
        loss, expected = instantiate(ours[key]), official[official_key]
        kind, options = LOSSES[type(expected)]
        assert type(loss) is kind
        assert options(loss) == options(expected)
        assert expected.reduction == "mean"
    clipping = (ours["trainer"]["gradient_clip_val"], ours["trainer"]["gradient_clip_algorithm"])
    if official.get("use_agc", False):
        # The default of bcos.training.agc.adaptive_clip_grad_, which is called without options.
        assert clipping == (0.01, "agc")
    else:
        assert clipping[0] is None
    if "ema" in official:
        assert ours["ema"]["decay"] == official["ema"]["decay"]
        assert ours["ema"]["every_n_steps"] == official["ema"]["steps"]
    else:
        assert ours["ema"] is None
    augmentation, data = ours["augmentation"], official["data"]
    assert augmentation["mixup_alpha"] == data.get("mixup_alpha", 0.0)
    assert augmentation["cutmix_alpha"] == data.get("cutmix_alpha", 0.0)
    assert augmentation["repetitions"] == data.get("ra_repetitions", 1)
    assert set(data) <= {
        *("train_transform", "test_transform", "batch_size", "num_workers", "num_classes"),
        *("mixup_alpha", "cutmix_alpha", "ra_repetitions"),
    }


def assert_same_optimizer(ours: Config, official: Config) -> None:
    model = nn.Linear(2, 2)
    made = instantiate(ours["optimizer"])(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        expected = official["optimizer"].create(model)
    assert type(made) is type(expected)
    assert len(made.param_groups) == len(expected.param_groups) == 1
    assert made.param_groups[0] == expected.param_groups[0]


def assert_same_rates(ours: Config, official: Config) -> None:
    """The rate of every epoch, and the interval at which it changes."""
    schedule, factory = instantiate(ours["schedule"]), official["lr_scheduler"]
    assert schedule.interval == factory.interval == "epoch"
    lr = ours["optimizer"]["lr"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        scheduler, expected = factory.create(optimizer), []
        for _ in range(official["trainer"]["max_epochs"]):
            expected.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    assert [schedule.lr(7 * epoch, 7, lr) for epoch in range(schedule.epochs)] == pytest.approx(expected, rel=1e-9)


def assert_same_imagenet_transforms(ours: Config, official: Config) -> None:
    for key, official_key in (("train", "train_transform"), ("eval", "test_transform")):
        options = dict(official["data"][official_key].args)
        is_bcos = options.pop("is_bcos")
        assert ours["encoding"] == {"_target_": f"bcos_train.dataset.{'BcosEncoding' if is_bcos else 'Standardize'}"}
        options["interpolation"] = options["interpolation"].value
        if "auto_augment_policy" in options:
            options["policy"] = options.pop("auto_augment_policy")
        assert ours["augmentation"][key] == {"_target_": f"bcos_train.augmentation.imagenet_{key}", **options}


def norm_facts(make: Callable[[int], nn.Module]) -> dict[str, Any]:
    """What tells one norm layer from another."""
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


def assert_same_bcos_model(ours: Config, official: Config) -> None:
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


def resnet_rows(configs: dict[str, Config]) -> list[str]:
    """The ResNets of a collection, without the repetitions with other seeds."""
    return [name for name in configs if name.startswith("resne") and "seed" not in name]


def test_rows() -> None:
    assert len(resnet_rows(BCOS_FINAL)) == 6
    assert len(resnet_rows(BCOS_FINAL_LONG)) == 2
    assert len(resnet_rows(BASELINE)) == 5
    assert len(NORM_STUDY) == 4 * (1 + 36) * 2 * 3


@pytest.mark.parametrize("row", resnet_rows(BCOS_FINAL))
def test_bcos_final(row: str) -> None:
    official = BCOS_FINAL[row]
    ours = compose(f"model={official['model']['name']}", "dataset=imagenet")
    assert_same_recipe(ours, official, gpus=4)
    assert_same_imagenet_transforms(ours, official)
    assert_same_bcos_model(ours, official)
    assert ours["name"] == "bcos_final"


@pytest.mark.parametrize("row", resnet_rows(BCOS_FINAL_LONG))
def test_bcos_final_long(row: str) -> None:
    official = BCOS_FINAL_LONG[row]
    ours = compose(f"model={official['model']['name']}", "dataset=imagenet", "recipe=long")
    assert_same_recipe(ours, official, gpus=8)
    assert_same_imagenet_transforms(ours, official)
    assert_same_bcos_model(ours, official)
    assert ours["name"] == "bcos_final_long"


@pytest.mark.parametrize("row", resnet_rows(BASELINE))
def test_baseline(row: str) -> None:
    official = BASELINE[row]
    name = official["model"]["name"]
    ours = compose(f"model=standard_{name}", "dataset=imagenet")
    assert_same_recipe(ours, official, gpus=4)
    assert_same_imagenet_transforms(ours, official)
    assert set(official["model"]["args"]) == {"num_classes"}
    assert ours["model"] == {
        "_target_": "bcos_train.model.create_model",
        "_partial_": True,
        "name": f"standard_{name}",
    }


@pytest.mark.parametrize("seed", [420, 1337])
def test_seeds(seed: int) -> None:
    for configs, row in ((BCOS_FINAL, "resnet_50"), (BASELINE, "resnet_50")):
        expected = {**configs[row], "seed": seed}
        assert configs[f"{row}-seed={seed}"].keys() == expected.keys()
        assert configs[f"{row}-seed={seed}"]["seed"] == seed
    assert compose("model=resnet50", "dataset=imagenet", f"seed={seed}")["seed"] == seed


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
    given: Config = {"model": {}}
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, last = key.split(".")
        (given[parents[0]] if parents else given)[last] = int(text) if text.isdigit() else text
    return overlay(config, given, [override.partition("=")[0] for override in overrides])


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_norm_study(depth: int) -> None:
    names = [name for name in NORM_STUDY if name.startswith(f"resnet_{depth}")]
    assert len(names) == 222
    for name in names:
        ours, official = study_config(name), NORM_STUDY[name]
        try:
            assert_same_bcos_model(ours, official)
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
