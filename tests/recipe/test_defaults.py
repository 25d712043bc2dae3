"""A default that stands in YAML and in Python is the same in both; deliberate differences are listed here."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

import pytest
from composing import COMPOSER, CONFIGS, compose
from hydra._internal.core_plugins.bash_completion import BashCompletion

from bcos_train import list_models
from bcos_train.config.composition import Composer
from bcos_train.config.model_choices import model_choices
from bcos_train.config.signature import keyword_parameters
from bcos_train.config.targets import resolve
from bcos_train.model.registry import model_signature
from bcos_train.training.config import EvaluateConfig, PrecomputeConfig, TrainConfig

GROUPS = [group for group in COMPOSER.groups if not group.startswith(("hydra", "recipe", "model"))]
CHOICES = [(group, choice) for group in GROUPS for choice in COMPOSER.choices(group)]

#: What these choices are for.
DELIBERATE = {
    "distillation=e2kd": {"distillation.explanation_weight"},
    "distillation=e2kd_frozen": {"distillation.explanation_weight", "distillation.frozen"},
    "augmentation=imagenet_ra": {
        "augmentation.mixup_alpha",
        "augmentation.train.policy",
        "augmentation.train.ra_magnitude",
    },
    "augmentation=imagenet_strong": {
        "augmentation.mixup_alpha",
        "augmentation.cutmix_alpha",
        "augmentation.repetitions",
        "augmentation.train.crop_size",
        "augmentation.train.policy",
        "augmentation.train.random_erase_prob",
        "augmentation.eval.resize_size",
    },
    "dataset=imagenet": {"schedule.warmup_epochs", "trainer.gradient_clip_val"},
    "dataset=imagefolder": {"schedule.warmup_epochs", "trainer.gradient_clip_val"},
    "augmentation=resize": {"augmentation.eval.size", "augmentation.train.size"},
    "dataset=coco": {"augmentation.eval.size", "augmentation.train.size"},
    "dataset=voc2007": {"augmentation.eval.size", "augmentation.train.size"},
    "dataset=waterbirds": {"augmentation.train.min_scale", "checkpointing.monitor"},
    "dataset=pasted": {"augmentation.train.padding", "augmentation.train.size"},
}


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All nodes with ``_target_``, with their keys."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from nodes(value, f"{path}.{index}")


def differing(config: Mapping[str, Any]) -> set[str]:
    """Keys that have another value in YAML than the parameter's default. Torch's own defaults are not ours."""
    found = set()
    for path, node in nodes(config):
        if node["_target_"].startswith("torch."):
            continue
        for key, parameter in keyword_parameters(resolve(node["_target_"]), node).items():
            if key in node and has_default(parameter.default) and not is_same(node[key], parameter.default):
                found.add(f"{path}.{key}")
    return found


def has_default(default: Any) -> bool:
    # A dataclass shows its default factories as an object of a private class.
    return default is not MISSING and type(default).__name__ not in ("_HAS_DEFAULT_FACTORY_CLASS", "type")


def is_same(yaml: Any, python: Any) -> bool:
    return yaml == (list(python) if isinstance(python, tuple) else python)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_yaml_and_python_have_the_same_defaults(group: str, choice: str) -> None:
    assert differing(compose(f"{group}={choice}")) == DELIBERATE.get(f"{group}={choice}", set())


def test_a_competing_default_is_found() -> None:
    config = compose("dataset=digits")
    model = {**config["model"], "b": 1.5}
    assert differing({**config, "model": model}) == {"model.b"}


@pytest.mark.parametrize(
    ("name", "root"), [("train", TrainConfig), ("evaluate", EvaluateConfig), ("precompute_teacher", PrecomputeConfig)]
)
def test_top_level_keys(name: str, root: type) -> None:
    config = compose(name=name)
    # These are groups: the choice in the defaults list is no value of the parameter.
    groups = {"explanation", "logger", "distillation"}
    defaults = {key: p.default for key, p in keyword_parameters(root, {}).items() if p.default is not p.empty}
    assert {key for key in defaults.keys() - groups if not is_same(config[key], defaults[key])} == set()


# The choices of the group ``model``.


def test_every_choice_shows_the_defaults_of_its_model() -> None:
    """Also those with a file: densenet121_long."""
    for name in list_models():
        node = (compose(f"model={name}") if name == "densenet121_long" else model_choices()[name])["model"]
        parameters = model_signature(name).parameters
        options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "name")}
        assert options == {key: parameters[key].default for key in options}, name


def test_a_file_replaces_the_choice_of_its_model(tmp_path: Any, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/resnet44.yaml").write_text(
        "# @package _global_\nmodel: {_target_: bcos_train.model.create_model, _partial_: true, name: resnet56}\n"
    )
    composer = Composer(CONFIGS, tmp_path)
    assert composer.compose("train", ["model=resnet44"])["model"]["name"] == "resnet56"
    assert composer.choices("model").count("resnet44") == 1
    assert composer.compose("train", ["model=resnet32"])["model"]["name"] == "resnet32"
    assert [warning for warning in recwarn if "schema" in str(warning.message)] == []
    # Without that folder it is the model's own again.
    assert Composer(CONFIGS).compose("train", ["model=resnet44"])["model"]["name"] == "resnet44"


def test_help_and_completion_know_the_models() -> None:
    """Both ask Hydra's loader."""
    loader = COMPOSER._loader
    completed = BashCompletion(loader)._query(config_name="train", line="model=resnet5")
    assert completed == ["model=resnet50", "model=resnet50_long", "model=resnet56"]
    assert set(list_models()) < set(loader.get_group_options("model"))
