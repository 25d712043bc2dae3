"""Every YAML composes, fits the signatures that it is passed to, and builds."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import COMPOSER, CONFIGS, compose
from PIL import Image
from torch import nn
from torchvision.models import get_model_weights

from bcos_train import list_models
from bcos_train.config import UserError, check, instantiate
from bcos_train.config.composition import Composer
from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.registry import model_signature
from bcos_train.training.config import EvaluateConfig, TrainConfig

GROUPS = [group for group in COMPOSER.groups if not group.startswith(("hydra", "recipe/"))]
CHOICES = [
    (group, choice) for group in GROUPS if group not in ("model", "recipe") for choice in COMPOSER.choices(group)
]
#: Values of keys that a choice leaves to the user.
NEEDED = {
    **{f"distillation={kind}": ("distillation.teacher=resnet20",) for kind in ("kd", "e2kd")},
    "distillation=e2kd_frozen": ("distillation.frozen=/maps",),
}
#: Of the models here; model=timm, which takes a name, is tested in tests/model/test_timm_model.py.
MODELS = [choice for choice in COMPOSER.choices("model") if choice != "timm"]
RECIPES = sorted(str(path.relative_to(CONFIGS / "recipe")) for path in CONFIGS.glob("recipe/**/[!_]*.yaml"))
#: Header of a recipe: its keys, in this order.
HEADER = ["paper", "command", "hardware", "published", "reproduced"]


def build(config: Mapping[str, Any]) -> TrainConfig:
    assert [str(problem) for problem in check(config, root=TrainConfig)] == []
    return TrainConfig(**instantiate(config))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_choice_of_every_group(group: str, choice: str) -> None:
    parts = build(compose(f"{group}={choice}", *NEEDED.get(f"{group}={choice}", ())))
    assert_works(parts)


#: One of each kind of model, the file of which differs from the others' in numbers only.
KINDS = {re.sub(r"\d+|_(tiny|small|base|large|atto|ti|s|b|l)(?=_|$)|_\d*x\d+d", "", name): name for name in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_on_imagenet(model: str) -> None:
    assert_composes(model, "imagenet")


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_on_imagenet_is_the_models_own(model: str) -> None:
    """What a run is evaluated on is what ``model.transform`` makes of an image."""
    config = compose(f"model={model}", "dataset=imagenet")
    with torch.device("meta"):
        own = Preprocessing.from_transform(build(config).model(num_classes=2).transform)
    assert own is not None
    if own.crop_size is None:
        # A network for CIFAR-10, whose transform does not resize; with ImageNet, images are cropped.
        assert model_signature(model).parameters["num_classes"].default == 10
        own = replace(own, resize_size=256, crop_size=224)
    assert own == Preprocessing.from_config(config["augmentation"], config["encoding"])


# Composing takes a moment: here one model of each kind.
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagefolder", "pasted", "voc2007", "waterbirds"])
@pytest.mark.parametrize("model", KINDS.values())
def test_every_kind_of_model_on_every_dataset(model: str, dataset: str) -> None:
    assert_composes(model, dataset)


def assert_composes(model: str, dataset: str) -> None:
    parts = build(compose(f"model={model}", f"dataset={dataset}"))
    assert isinstance(parts.model, partial)
    assert parts.model.keywords["name"] == model
    assert parts.dataset.name == dataset
    assert parts.encoding.in_channels == (3 if model.startswith("standard_") else 6)


def assert_works(parts: TrainConfig) -> None:
    """Each part does what it is for, on next to nothing."""
    weight = torch.ones(4, 3, requires_grad=True)
    optimizer = parts.optimizer([weight])
    logits = torch.rand(2, 3) @ weight.T
    for loss in (parts.loss, parts.eval_loss):
        assert loss(logits, torch.tensor([0, 3])).isfinite()
    parts.loss(logits, torch.tensor([0, 3])).backward()
    optimizer.step()
    assert weight.isfinite().all()
    assert 0 < parts.schedule.lr(1, 1, 0.1) <= 0.1
    assert parts.schedule.epochs == parts.trainer.max_epochs
    image = Image.new("RGB", (32, 32) if parts.dataset.name in ("digits", "cifar10") else (300, 260))
    for transform in (parts.augmentation.train, parts.augmentation.eval):
        pixels = transform(image)
        assert pixels.dtype == torch.uint8
        assert parts.encoding(pixels[None]).shape == (1, parts.encoding.in_channels, *pixels.shape[1:])


@pytest.mark.parametrize("name", [name for name in MODELS if re.fullmatch(r"resnet(20|32)|resnext29_32x4d", name)])
def test_small_models_are_built(name: str) -> None:
    model = build(compose(f"model={name}")).model(num_classes=5)
    assert isinstance(model, nn.Module)
    assert model(torch.rand(2, 6, 16, 16)).shape == (2, 5)


def test_every_model_has_a_config_of_its_name() -> None:
    # That the file of a name names the model is in the sweeps above.
    assert sorted(MODELS) == sorted(list_models())


def test_the_default_needs_no_data_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    assert build(COMPOSER.compose("train")).dataset.name == "digits"


@pytest.mark.parametrize(
    ("dataset", "variable"),
    [
        ("cifar10", "DATA_ROOT"),
        ("imagenet", "IMAGENET_PATH"),
        ("imagefolder", "DATA_ROOT"),
        ("pasted", "DATA_ROOT"),
        ("voc2007", "DATA_ROOT"),
        ("waterbirds", "DATA_ROOT"),
        ("coco", "DATA_ROOT"),
    ],
)
def test_data_without_a_folder(dataset: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    config = COMPOSER.compose("train", [f"dataset={dataset}"])
    with pytest.raises(UserError, match=f"dataset: .*set {variable} or dataset.root"):
        build(config)
    monkeypatch.setenv(variable, "/elsewhere")
    assert COMPOSER.compose("train", [f"dataset={dataset}"])["dataset"]["root"] == "/elsewhere"


@pytest.mark.parametrize("overrides", [(), ("model=resnet50", "dataset=imagenet", "weights=w.pth"), ("run=runs/a",)])
def test_evaluate(overrides: tuple[str, ...]) -> None:
    config = compose(*overrides, name="evaluate")
    assert [str(problem) for problem in check(config, root=EvaluateConfig)] == []
    parts = EvaluateConfig(**instantiate(config))
    assert parts.checkpoint == "best"


def test_evaluate_adds_its_keys_to_those_of_train() -> None:
    train, evaluate = compose("dataset=cifar10"), compose("dataset=cifar10", name="evaluate")
    added = {"run": None, "checkpoint": "best", "weights": None, "use_ema": None, "output": None}
    assert evaluate == train | added


# Recipes.


def test_the_command_line_wins_over_a_recipe() -> None:
    config = compose("recipe=long", "model=resnet50", "dataset=imagenet", "augmentation=plain", "trainer.max_epochs=3")
    assert config["augmentation"]["train"] == {"_target_": "bcos_train.augmentation.plain"}
    assert config["trainer"]["max_epochs"] == config["schedule"]["epochs"] == 3
    assert config["name"] == "bcos_final_long"
    assert compose("model=resnext50_32x4d", "dataset=imagenet", "trainer.max_epochs=3")["schedule"]["epochs"] == 3


@pytest.mark.parametrize("model", ["resnet50_long", "densenet121_long", "vitc_l_patch1_14"])
def test_the_command_line_wins_over_the_recipe_of_model_and_dataset(model: str) -> None:
    config = compose(f"model={model}", "dataset=imagenet", "augmentation=plain", "loss=bce", "batch_size=8")
    assert config["augmentation"] == compose("augmentation=plain")["augmentation"]
    assert config["loss"] == compose("loss=bce")["loss"]
    assert config["batch_size"] == 8
    chosen = compose(f"model={model}", "dataset=imagenet", "augmentation=imagenet_ra")["augmentation"]
    assert chosen["train"] == compose("augmentation=imagenet_ra")["augmentation"]["train"]
    config = compose(f"model={model}", "dataset=imagenet", "augmentation.train.policy=augmix")
    assert config["augmentation"]["train"]["policy"] == "augmix"


def test_bases_are_no_choices() -> None:
    assert not [choice for group in GROUPS for choice in COMPOSER.choices(group) if "_" in (choice[0], group[0])]
    assert not [group for group in COMPOSER.groups if "/_" in group]


def test_a_users_recipe_comes_after_that_of_model_and_dataset(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "short.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: sgd\ntrainer:\n  max_epochs: 30\n"
    )
    command = ["model=vitc_s_patch1_14", "dataset=imagenet"]
    composer = Composer(CONFIGS, tmp_path)
    short = composer.compose("train", [*command, "recipe=short"])
    expected = composer.compose("train", [*command, "optimizer=sgd", "trainer.max_epochs=30"])
    own = compose(*command)
    assert short == expected
    assert short["schedule"] == {**own["schedule"], "epochs": 30}
    assert own["augmentation"] == compose("augmentation=imagenet_ra")["augmentation"]


BCOS_E2KD = {
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3, "weight_decay": 0.0},
    "trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "agc"},
    "loss": {"_target_": "bcos_train.loss.UniformOffLabelBinaryCrossEntropy"},
    "distillation": {"teacher": "densenet169"},
}
WARM_UP = {"schedule": {"interval": "epoch", "warmup_epochs": 5, "warmup_steps": None, "warmup_decay": 0.01}}
STANDARD_E2KD = WARM_UP | {
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 1e-4},
    "trainer": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"},
    "loss": {"_target_": "bcos_train.loss.CrossEntropy"},
    "distillation": {"teacher": "standard_resnet34", "explanation": "grad_cam"},
}
#: Published settings of e2KD (arXiv 2402.03119): epochs, batch, shots, interval of the explanations, and the rest.
E2KD: dict[str, tuple[int, int, int | None, int, dict[str, dict[str, Any]]]] = {
    "model=resnet18 recipe=e2kd": (200, 256, None, 16, BCOS_E2KD | WARM_UP),
    "model=simple_vit_ti_patch16_224 recipe=e2kd_vit": (
        *(150, 256, None, 4),
        BCOS_E2KD | {"schedule": {"interval": "step", "warmup_epochs": None, "warmup_steps": 10_000}},
    ),
    "model=simple_vit_ti_patch16_224 recipe=e2kd_vit_frozen distillation.frozen=maps": (
        *(150, 256, None, 16),
        BCOS_E2KD
        | {
            "schedule": {"interval": "step", "warmup_epochs": None, "warmup_steps": 10_000},
            "distillation": {"teacher": None, "frozen": "maps"},
        },
    ),
    "model=standard_resnet18 recipe=e2kd_standard": (200, 256, None, 16, STANDARD_E2KD),
    "model=resnet18 recipe=[e2kd,shots50]": (250, 32, 50, 16, BCOS_E2KD | WARM_UP),
    "model=resnet18 recipe=[e2kd,shots200]": (125, 64, 200, 16, BCOS_E2KD | WARM_UP),
    "model=standard_resnet18 recipe=[e2kd_standard,shots50]": (250, 32, 50, 16, STANDARD_E2KD),
    "model=standard_resnet18 recipe=[e2kd_standard,shots200]": (125, 64, 200, 16, STANDARD_E2KD),
}


@pytest.mark.parametrize("command", E2KD)
def test_published_settings_of_e2kd(command: str) -> None:
    epochs, batch, shots, interval, settings = E2KD[command]
    config = compose("dataset=imagenet", *command.split())
    assert config["schedule"]["_target_"] == "bcos_train.schedule.Cosine"
    assert (config["trainer"]["max_epochs"], config["batch_size"]) == (epochs, batch)
    assert (config["dataset"]["shots"], config["dataset"]["val_per_class"]) == (shots, 50)
    assert (config["dataset"]["split_seed"], config["seed"], config["ema"]) == (42, 42, None)
    distillation = {"temperature": 1, "explanation_weight": 1, "kd_weight": 1, "ground_truth_weight": 0}
    distillation |= {"explanation_every_n_steps": interval, **settings["distillation"]}
    for group, values in (settings | {"distillation": distillation}).items():
        assert {key: config[group][key] for key in values} == values
    policy = ("ra", 10) if command.endswith("recipe=e2kd_vit") else (None, 9)
    train = config["augmentation"]["train"]
    assert (train["policy"], train["ra_magnitude"]) == policy
    assert (train["crop_size"], train["hflip_prob"], train["random_erase_prob"]) == (224, 0.5, 0.0)
    assert config["augmentation"]["mixup_alpha"] == config["augmentation"]["cutmix_alpha"] == 0


def header(path: str) -> dict[str, str]:
    """Key and text of each entry of a recipe's opening comment."""
    entries: dict[str, str] = {}
    key = ""
    for line in (CONFIGS / "recipe" / path).read_text().splitlines():
        if not line.startswith("#"):
            break
        found = re.match(r"# ([a-z]+): +(.*)", line)
        if found:
            key = found[1]
            entries[key] = found[2]
        elif key:
            entries[key] += "\n" + line.lstrip("# ")
    return entries


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_header(path: str) -> None:
    entries = header(path)
    assert list(entries) == HEADER
    assert all(entries.values())
    assert re.fullmatch(r"not yet|\d.*", entries["reproduced"])
    for command in entries["command"].splitlines():
        assert command.startswith("python train.py ")
        overrides = shlex.split(command.removeprefix("python train.py "))
        # As the command line adds keys that a model's file doesn't list.
        config = compose(*(f"++{text}" if "." in text else text for text in overrides))
        build(config)
        text = (CONFIGS / "recipe" / path).read_text()
        assert f"\nname: {config['name']}\n" in text
        if "/" in path:
            long = "_long" if "recipe=long" in overrides else ""
            model = f"{config['model']['name']}{long}"
            assert Path(path).with_suffix("").parts == (config_choice(overrides, "dataset"), model)


def config_choice(overrides: list[str], group: str) -> str:
    (choice,) = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    return choice


#: Top-1 and top-5 on ImageNet in per cent, of the official README.
PUBLISHED = {
    "resnet18": (68.736, 87.43),
    "resnet34": (72.284, 90.052),
    "resnet50": (75.882, 92.528),
    "resnet101": (76.532, 92.538),
    "resnet152": (76.484, 92.398),
    "resnext50_32x4d": (75.82, 91.81),
    "densenet121": (73.612, 91.106),
    "densenet161": (76.622, 92.554),
    "densenet169": (75.186, 91.786),
    "densenet201": (75.48, 91.992),
    "vgg11_bnu": (69.31, 88.388),
    "convnext_tiny": (77.488, 93.192),
    "convnext_base": (79.65, 94.614),
    "convnext_tiny_bnu": (76.826, 93.09),
    "convnext_base_bnu": (80.142, 94.834),
    "densenet121_long": (77.302, 93.234),
    "resnet50_long": (79.468, 94.452),
    "resnet152_long": (80.144, 94.116),
    "simple_vit_ti_patch16_224": (59.96, 81.838),
    "simple_vit_s_patch16_224": (69.246, 88.096),
    "simple_vit_b_patch16_224": (74.408, 91.156),
    "simple_vit_l_patch16_224": (75.06, 91.378),
    "vitc_ti_patch1_14": (67.26, 86.774),
    "vitc_s_patch1_14": (74.504, 91.288),
    "vitc_b_patch1_14": (77.152, 92.926),
    "vitc_l_patch1_14": (77.782, 92.966),
    "standard_simple_vit_ti_patch16_224": (70.23, 89.38),
    "standard_simple_vit_s_patch16_224": (74.47, 91.226),
    "standard_simple_vit_b_patch16_224": (75.3, 91.026),
    "standard_simple_vit_l_patch16_224": (75.71, 90.05),
    "standard_vitc_ti_patch1_14": (72.59, 90.788),
    "standard_vitc_s_patch1_14": (75.756, 91.994),
    "standard_vitc_b_patch1_14": (76.79, 92.024),
    "standard_vitc_l_patch1_14": (77.866, 92.298),
}


@pytest.mark.parametrize(("model", "figures"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_figures(model: str, figures: tuple[float, float]) -> None:
    assert percentages(f"imagenet/{model}.yaml") == list(figures)


def test_published_figures_of_the_long_recipe() -> None:
    rows = [PUBLISHED[f"{model}_long"] for model in ("resnet50", "resnet152", "densenet121")]
    assert percentages("long.yaml") == [figure for row in rows for figure in row]


@pytest.mark.parametrize(
    "model", [Path(path).stem for path in RECIPES if "/standard_" in path and Path(path).stem not in PUBLISHED]
)
def test_published_figures_of_torchvision(model: str) -> None:
    metrics = get_model_weights(model.removeprefix("standard_"))["IMAGENET1K_V1"].meta["_metrics"]["ImageNet-1K"]
    assert percentages(f"imagenet/{model}.yaml") == [metrics["acc@1"], metrics["acc@5"]]


def percentages(path: str) -> list[float]:
    return [float(text) for text in re.findall(r"([\d.]+) %", header(path)["published"])]


@pytest.mark.parametrize("model", ["resnet50_long", "simple_vit_ti_patch16_224", "convnext_tiny"])
@pytest.mark.parametrize("choice", ["imagenet", "plain", "imagenet_ra"])
def test_an_augmentation_selected_by_name_is_unchanged(model: str, choice: str) -> None:
    named = compose(f"model={model}", "dataset=imagenet", f"augmentation={choice}")
    expected = compose("model=resnet18", "dataset=imagenet", f"augmentation={choice}")
    assert named["augmentation"] == expected["augmentation"]
    assert named["augmentation"] != compose(f"model={model}", "dataset=imagenet")["augmentation"] or (
        choice == "imagenet_ra" and model.startswith("simple_vit")
    )
