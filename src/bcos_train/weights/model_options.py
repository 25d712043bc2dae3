"""Build a model by name, ours or timm's, and compare the options that weights were trained with."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from bcos_train.model import create_model, model_signature, timm_model
from bcos_train.utils.suggestions import join_words, suggest

__all__ = ["TIMM", "build_model", "check_options", "known_options", "model_of_config", "option_differences"]

#: Prefix of the names of timm's models.
TIMM = "timm:"
#: Options that may differ between training and use: they don't change the function that the weights define.
_FREE_OPTIONS = (
    "num_classes",
    "stochastic_depth_prob",
    "drop_rate",
    "drop_path_rate",
    "dropout",
    "memory_efficient",
    "backend",
    "grad_checkpointing",
)
#: Keys of a config's ``model`` node that are not options of the model.
_NOT_OPTIONS = ("_target_", "_partial_", "name", "pretrained", "weights", "progress", "backend", "grad_checkpointing")


def model_of_config(node: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Return the name and options of the model that a config's ``model`` node describes.

    Raises:
        KeyError: The node names no model.
    """
    is_timm = str(node.get("_target_")).endswith(".timm_model")
    options = {key: value for key, value in node.items() if key not in _NOT_OPTIONS}
    return f"{TIMM if is_timm else ''}{node['name']}", options


def known_options(name: str) -> dict[str, object]:
    """Return the model's options with their defaults.

    Raises:
        ValueError: Unknown model.
    """
    signature = inspect.signature(timm_model) if name.startswith(TIMM) else model_signature(name)
    return {key: p.default for key, p in signature.parameters.items() if key not in ("name", "pretrained")}


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Raise a ValueError if the model is unknown or lacks one of the options."""
    known = known_options(name)
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")


def build_model(name: str, options: Mapping[str, object]) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: Model name; ``timm:<name>`` for one of timm's.
        options: Keyword parameters of the model.

    Raises:
        ValueError: Unknown model or option, or a value that the model doesn't take.
    """
    check_options(name, options)
    build: Callable[..., nn.Module] = partial(create_model, name)
    if name.startswith(TIMM):
        build = partial(timm_model, name.removeprefix(TIMM))
    try:
        return build(**options)
    except TypeError as error:
        numbers = {key for key, default in known_options(name).items() if isinstance(default, (int, float))}
        wrong = {k: value for k, value in options.items() if k in numbers and not isinstance(value, (int, float))}
        listed = ", ".join(f"{key}={value}" for key, value in (wrong or options).items())
        reason = f"{join_words(wrong, 'and')}: expected a number" if wrong else " ".join(str(error).split())
        raise ValueError(f"can't build {name} with {listed} ({reason})") from error


def option_differences(
    trained: Mapping[str, object], options: Mapping[str, object], defaults: Mapping[str, object]
) -> str:
    """Describe how a model differs from the trained one in options that change its function.

    Args:
        trained: Options that the weights were trained with.
        options: Options that the model is built with.
        defaults: Default options, used when only one side specifies them.

    Returns:
        A message without its subject; empty if the function is the same.
    """
    trained, current = ({key: _as_list(v) for key, v in {**defaults, **o}.items()} for o in (trained, options))
    shared = [key for key in trained if key in current and key not in _FREE_OPTIONS]
    # `is` first: values such as NaN or a function's empty default differ from themselves.
    keys = [key for key in shared if trained[key] is not current[key] and trained[key] != current[key]]
    if not keys:
        return ""
    before, now = (", ".join(f"{key}={values[key]}" for key in keys) for values in (trained, current))
    command = " ".join(f"model.{key}={'null' if trained[key] is None else trained[key]}" for key in keys)
    # A .pth file written by scripts/export_weights.py carries no options.
    intended = "if the difference is intended, use a bare weights file, as written by scripts/export_weights.py (.pth)"
    return f"were trained with {before}, the model has {now}: set {before} (on the command line {command}); {intended}"


def _as_list(value: object) -> object:
    """Convert a tuple to a list, as JSON and YAML have it."""
    return list(value) if isinstance(value, tuple) else value
