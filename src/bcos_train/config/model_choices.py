"""Choices of the config group ``model``: one for each registered model, without a YAML file each.

A choice shows the options that are changed most, with the defaults of the model's constructor. A file
``configs/model/<name>.yaml`` replaces it, for a model that changes other groups too.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from bcos_train.model.registry import list_models, model_signature

__all__ = ["model_choices"]

T = TypeVar("T")

#: Options that are shown, in this order. All others can be set as well.
SHOWN = (
    "norm_layer",
    "b",
    "max_out",
    "stochastic_depth_prob",
    "layer_scale",
    "drop_rate",
    "memory_efficient",
    "patch_size",
)
#: Exceptions by name: these models show these options only.
SHOWN_BY_NAME = {
    "standard_simple_vit_*": ("patch_size",),
    "standard_*": (),
    "vitc_*": ("b", "max_out"),
    "simple_vit_*": ("b", "max_out", "patch_size"),
    "plain_cnn*": ("b", "max_out", "layer_scale", "logit_temperature"),
}
#: Standard networks take standardized RGB and their own recipe: configs/model/_standard*.yaml.
BASES = {"standard_simple_vit_*": "_standard_vit", "standard_vitc_*": "_standard_vit", "standard_*": "_standard"}


def model_choices() -> dict[str, dict[str, object]]:
    """Return, by model name, the content of a config file, to be merged at the top of the config."""
    return {name: _choice(name) for name in list_models()}


def _choice(name: str) -> dict[str, object]:
    node = {"_target_": "bcos_train.model.create_model", "_partial_": True, "name": name, **_options(name)}
    base = _first_match(BASES, name)
    return {"model": node} if base is None else {"defaults": [base], "model": node}


def _options(name: str) -> dict[str, object]:
    parameters = model_signature(name).parameters
    shown = _first_match(SHOWN_BY_NAME, name)
    if shown is None:
        # The small networks of the norm study (ten classes) have no stochastic depth there.
        is_small = parameters["num_classes"].default == 10 if "num_classes" in parameters else False
        shown = tuple(key for key in SHOWN if not (is_small and key == "stochastic_depth_prob"))
    defaults = {key: parameters[key].default for key in shown if key in parameters}
    # Others cannot be written in YAML, such as no default at all.
    return {key: value for key, value in defaults.items() if isinstance(value, (bool, int, float, str, type(None)))}


def _first_match(table: Mapping[str, T], name: str) -> T | None:
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)
