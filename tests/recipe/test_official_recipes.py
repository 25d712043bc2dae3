"""The ImageNet recipes against the official experiments, value by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bcos.experiments.ImageNet.baseline.experiment_parameters import CONFIGS as BASELINE
from bcos.experiments.ImageNet.baseline.model import get_model as get_baseline
from bcos.experiments.ImageNet.bcos_final.experiment_parameters import CONFIGS as BCOS_FINAL
from bcos.experiments.ImageNet.bcos_final.model import get_model as get_bcos
from bcos.experiments.ImageNet.bcos_final_long.experiment_parameters import CONFIGS as BCOS_FINAL_LONG
from bcos.experiments.ImageNet.vit_final.experiment_parameters import CONFIGS as VIT_FINAL
from bcos.experiments.ImageNet.vit_final.model import get_model as get_vit
from comparing import Config, assert_same_imagenet_model, assert_same_imagenet_transforms, assert_same_recipe
from composing import compose
from torch import nn

from bcos_train.config import UserError


class Collection(NamedTuple):
    configs: dict[str, Config]
    get_model: Callable[[Config], nn.Module]
    gpus: int


COLLECTIONS = {
    "bcos_final": Collection(BCOS_FINAL, get_bcos, 4),
    "bcos_final_long": Collection(BCOS_FINAL_LONG, get_bcos, 8),
    "vit_final": Collection(VIT_FINAL, get_vit, 8),
    "baseline": Collection(BASELINE, get_baseline, 4),
}


def our_name(collection: str, experiment: str) -> str:
    """The model whose name alone, with ``dataset=imagenet``, is this experiment."""
    name = COLLECTIONS[collection].configs[experiment]["model"]["name"]
    if collection == "baseline":
        return f"standard_{name}"
    if collection == "vit_final":
        return name if experiment.startswith("bcos_") else f"standard_{name}"
    if collection == "bcos_final_long":
        if name.startswith("convnext"):
            return f"{name}_bnu" if experiment.endswith("_bnu") else name
        return f"{name}_long"
    return name


#: Collection and experiment of each, without the repetitions with other seeds.
EXPERIMENTS = {
    our_name(collection, experiment): (collection, experiment)
    for collection, (configs, _, _) in COLLECTIONS.items()
    for experiment in configs
    if "seed" not in experiment
}


def gpus_of(collection: str, official: Config) -> int:
    # The large ViTs take half as many images a GPU; the batch stays the paper's.
    is_halved = collection == "vit_final" and official["data"]["batch_size"] == 64
    return COLLECTIONS[collection].gpus * (2 if is_halved else 1)


def assert_equals_official(ours: Config, collection: str, experiment: str) -> None:
    configs, get_model, _ = COLLECTIONS[collection]
    official = configs[experiment]
    assert_same_recipe(ours, official, gpus_of(collection, official))
    assert_same_imagenet_transforms(ours, official)
    assert_same_imagenet_model(ours, official, get_model)
    assert ours["name"] == collection


def test_rows(rows: dict[str, Any]) -> None:
    counts = {"bcos_final": 11, "bcos_final_long": 7, "vit_final": 16, "baseline": 10}
    assert {name: [c for c, _ in EXPERIMENTS.values()].count(name) for name in COLLECTIONS} == counts
    assert {name: pair for name, pair in EXPERIMENTS.items() if pair[0] != "baseline"} == rows


@pytest.fixture
def rows() -> dict[str, tuple[str, str]]:
    """Collection and experiment of each row of the Model Zoo."""
    from bcos.models import pretrained

    urls = {Path(url).name: (c, e) for c, members in pretrained.URLS.items() for e, url in members.items()}
    assert len(urls) == len(pretrained.list_available()) == 34
    entries = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in pretrained.list_available():
            patch.setattr(pretrained, "_get_model", lambda experiment, *args, **options: (experiment, options))
            experiment, options = getattr(pretrained, name)()
            entries[name] = (options.get("base_network", "bcos_final"), experiment)
    assert sorted(entries.values()) == sorted(urls.values())
    return entries


@pytest.mark.parametrize("model", EXPERIMENTS)
def test_model_and_data_set_choose_the_official_recipe(model: str) -> None:
    ours = compose(f"model={model}", "dataset=imagenet")
    assert_equals_official(ours, *EXPERIMENTS[model])
    assert ours["model"]["name"] == model


@pytest.mark.parametrize("model", ["resnet50", "resnet152", "densenet121"])
def test_long_recipe(model: str) -> None:
    ours = compose(f"model={model}", "dataset=imagenet", "recipe=long")
    assert_equals_official(ours, *EXPERIMENTS[f"{model}_long"])
    row = compose(f"model={model}_long", "dataset=imagenet")
    assert ours == {**row, "model": {**row["model"], "name": model}}
    # Said twice, it is the same.
    assert compose(f"model={model}_long", "dataset=imagenet", "recipe=long") == row


def test_long_recipe_of_a_model_that_has_no_row() -> None:
    ours, row = (compose(f"model={model}", "dataset=imagenet", "recipe=long") for model in ("resnet101", "resnet50"))
    assert ours["model"]["stochastic_depth_prob"] == 0.0
    assert {**ours, "model": None} == {**row, "model": None}


@pytest.mark.parametrize("model", ["convnext_tiny", "convnext_base_bnu"])
def test_a_long_recipe_said_again(model: str) -> None:
    assert compose(f"model={model}", "dataset=imagenet", "recipe=long") == compose(f"model={model}", "dataset=imagenet")


@pytest.mark.parametrize(
    ("model", "like"), [("convnext_atto", "tiny"), ("convnext_small", "tiny"), ("convnext_large", "base")]
)
def test_convnexts_without_an_official_configuration(model: str, like: str) -> None:
    """As the official ones, but for the network itself."""
    ours, official = (compose(f"model={name}", "dataset=imagenet") for name in (model, f"convnext_{like}"))
    assert ours == {**official, "model": ours["model"]}


def test_long_recipe_on_imagefolder() -> None:
    ours, row = (compose("model=resnet101", f"dataset={name}", "recipe=long") for name in ("imagefolder", "imagenet"))
    assert ours == {**row, "dataset": ours["dataset"]}


#: What the long recipe makes no sense with: one of each kind.
OTHERS = [
    "standard_resnet50",
    "standard_convnext_tiny",
    "standard_vitc_s_patch1_14",
    "simple_vit_ti_patch16_224",
    "timm",
]


@pytest.mark.parametrize("model", OTHERS)
def test_long_recipe_is_for_bcos_convnets(model: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe=long: not for model={model}; it is for B-cos ConvNets \(resnet50, "):
        compose(f"model={model}", "dataset=imagenet", "recipe=long")


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
@pytest.mark.parametrize("model", ["resnet20", "resnet50_long"])
def test_long_recipe_is_for_large_images(model: str, dataset: str) -> None:
    allowed = "dataset=imagenet or imagefolder"
    with pytest.raises(UserError, match=f"^recipe=long: not for dataset={dataset}; it is for .* with {allowed}$"):
        compose(f"model={model}", f"dataset={dataset}", "recipe=long")


def texts(official: Config) -> dict[str, str]:
    """The parts are objects that know no equality."""
    return {key: repr(value) for key, value in official.items()}


@pytest.mark.parametrize("seed", [420, 1337])
def test_seeds(seed: int) -> None:
    for configs in (BCOS_FINAL, BASELINE):
        first = [row for row in configs if "seed" not in row]
        assert len(configs) == 3 * len(first)
        for row in first:
            again = configs[f"{row}-seed={seed}"]
            assert again["seed"] == seed
            assert texts(again) == {**texts(configs[row]), "seed": str(seed)}
    for model in ("densenet161", "standard_vgg11_bn"):
        config = compose(f"model={model}", "dataset=imagenet")
        assert compose(f"model={model}", "dataset=imagenet", f"seed={seed}") == {**config, "seed": seed}


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
@pytest.mark.parametrize("model", ["densenet121_long", "convnext_tiny", "vitc_l_patch1_14"])
def test_another_data_set_keeps_its_own_recipe(model: str, dataset: str) -> None:
    ours, usual = (compose(f"model={name}", f"dataset={dataset}") for name in (model, "resnet110"))
    assert ours == {**usual, "model": ours["model"]}


@pytest.mark.parametrize("dataset", ["cifar10", "digits", "imagefolder"])
def test_standard_vits_keep_loss_and_optimizer_on_any_data(dataset: str) -> None:
    ours = compose("model=standard_simple_vit_ti_patch16_224", f"dataset={dataset}")
    row = compose("model=standard_simple_vit_ti_patch16_224", "dataset=imagenet")
    for key in ("model", "encoding", "loss", "eval_loss", "optimizer"):
        assert ours[key] == row[key]
    usual = compose("model=resnet110", f"dataset={dataset}")
    clipping = {key: row["trainer"][key] for key in ("gradient_clip_val", "gradient_clip_algorithm")}
    assert clipping == {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}
    assert ours["trainer"] == {**usual["trainer"], **clipping}
    for key in ("augmentation", "schedule", "batch_size"):
        assert ours[key] == usual[key]


#: The authors' code (github.com/sukrutrao/Model-Guidance at 9711d4c): the commands of its README and its fixed values.
GUIDANCE_ON_VOC = {
    "seed": 0,
    "batch_size": 64,
    "drop_last": False,
    "optimizer._target_": "torch.optim.Adam",
    "optimizer.lr": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0,
    "schedule._target_": "bcos_train.schedule.Constant",
    "schedule.warmup_epochs": None,
    "schedule.warmup_steps": None,
    "loss._target_": "bcos_train.loss.BinaryCrossEntropy",
    "loss.smoothing": 0,
    "loss.target_threshold": None,
    "augmentation.train": {"_target_": "bcos_train.augmentation.plain", "size": 224},
    "augmentation.eval": {"_target_": "bcos_train.augmentation.plain", "size": 224},
    "augmentation.mixup_alpha": 0,
    "augmentation.cutmix_alpha": 0,
    "dataset.train": "train",
    "dataset.val": "val",
    "model.logit_bias": -6.9068,
    "trainer.gradient_clip_val": None,
    "trainer.precision": 32,
    "ema": None,
}
ENERGY_AT_THE_INPUT = {
    "loss": "energy",
    "weight": 1e-3,
    "method": "bcos",
    "layer": "input",
    "start_epoch": 0,
    "annotated_fraction": 1,
    "box_dilation": 0,
}


@pytest.mark.parametrize(
    ("overrides", "epochs", "guidance"),
    [
        (["guidance=none", "trainer.max_epochs=300", "++model.pretrained=true"], 300, None),
        (["++model.weights=RUN"], 50, ENERGY_AT_THE_INPUT),
    ],
)
def test_guidance_on_voc(overrides: list[str], epochs: int, guidance: Config | None) -> None:
    ours = compose("model=resnet50", "dataset=voc2007", "recipe=guidance_voc", *overrides)
    for path, value in GUIDANCE_ON_VOC.items():
        node: Any = ours
        for key in path.split("."):
            node = node[key]
        assert node == value, path
    assert ours["trainer"]["max_epochs"] == epochs
    if guidance is None:
        assert ours["guidance"] is None
    else:
        assert {key: ours["guidance"][key] for key in guidance} == guidance


def test_guidance_on_voc_is_for_that_data_set() -> None:
    with pytest.raises(UserError, match=r"^recipe=guidance_voc: not for dataset=pasted; it is for B-cos ConvNets"):
        compose("model=resnet50", "dataset=pasted", "recipe=guidance_voc")
