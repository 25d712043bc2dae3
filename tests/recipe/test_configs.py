"""Every YAML composes, fits the signatures that it is passed to, and builds."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import COMPOSER, CONFIGS, compose
from PIL import Image
from torch import nn

from bcos_train import list_models
from bcos_train.config import UserError, check, instantiate
from bcos_train.run import EvaluateConfig, TrainConfig

GROUPS = [group for group in COMPOSER.groups if not group.startswith(("hydra", "recipe/"))]
CHOICES = [
    (group, choice) for group in GROUPS if group not in ("model", "recipe") for choice in COMPOSER.choices(group)
]
MODELS = COMPOSER.choices("model")
RECIPES = sorted(str(path.relative_to(CONFIGS / "recipe")) for path in CONFIGS.glob("recipe/**/*.yaml"))
#: Header of a recipe: its keys, in this order.
HEADER = ["paper", "command", "hardware", "published", "reproduced"]


def build(config: Mapping[str, Any]) -> TrainConfig:
    assert [str(problem) for problem in check(config, root=TrainConfig)] == []
    return TrainConfig(**instantiate(config))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_choice_of_every_group(group: str, choice: str) -> None:
    parts = build(compose(f"{group}={choice}"))
    assert_works(parts)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_on_every_dataset(model: str, dataset: str) -> None:
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
    image = Image.new("RGB", (300, 260) if parts.dataset.name in ("imagenet", "imagefolder") else (32, 32))
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
    assert sorted(MODELS) == sorted(list_models())
    for name in MODELS:
        assert compose(f"model={name}")["model"]["name"] == name


def test_the_default_needs_no_data_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    assert build(COMPOSER.compose("train")).dataset.name == "digits"


@pytest.mark.parametrize(
    ("dataset", "variable"), [("cifar10", "DATA_ROOT"), ("imagenet", "IMAGENET_PATH"), ("imagefolder", "DATA_ROOT")]
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


def test_models_without_a_recipe_of_their_own() -> None:
    assert compose("model=resnet110", "dataset=cifar10")["name"] == "default"
    assert compose()["name"] == "default"


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
        overrides = command.removeprefix("python train.py ").split()
        config = compose(*overrides)
        build(config)
        text = (CONFIGS / "recipe" / path).read_text()
        assert f"\nname: {config['name']}\n" in text
        if "/" in path:
            assert Path(path).with_suffix("").parts == (config_choice(overrides, "dataset"), config["model"]["name"])


def config_choice(overrides: list[str], group: str) -> str:
    (choice,) = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    return choice


#: Top-1 and top-5 on ImageNet in per cent, of the official README.
PUBLISHED = {
    "imagenet/resnet18.yaml": (68.736, 87.43),
    "imagenet/resnet34.yaml": (72.284, 90.052),
    "imagenet/resnet50.yaml": (75.882, 92.528),
    "imagenet/resnet101.yaml": (76.532, 92.538),
    "imagenet/resnet152.yaml": (76.484, 92.398),
    "imagenet/resnext50_32x4d.yaml": (75.82, 91.81),
    "long.yaml": (79.468, 94.452, 80.144, 94.116),
}


@pytest.mark.parametrize(("path", "figures"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_figures(path: str, figures: tuple[float, ...]) -> None:
    assert [float(text) for text in re.findall(r"([\d.]+) %", header(path)["published"])] == list(figures)
