"""Build models with weights: the part of :func:`bcos_train.create_model` that reads files."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from bcos_train.nn import LogitLayer
from bcos_train.weights.model_options import build_model
from bcos_train.weights.records import RECORDS
from bcos_train.weights.source import WeightsSource, read_model_weights
from bcos_train.weights.state_dict import count_classes, load_weights

__all__ = ["build_from_source", "build_with_weights", "warn_of_assumed_bias", "with_num_classes"]


def build_with_weights(
    name: str,
    weights: str | os.PathLike[str],
    options: Mapping[str, object],
    build: Callable[[Mapping[str, object]], nn.Module],
    *,
    progress: bool,
) -> nn.Module:
    """Build a model and load weights into it; arguments and errors as for :func:`bcos_train.create_model`.

    Args:
        build: Builds the model from all of its options, with random weights.

    Warns:
        UserWarning: As for :func:`warn_of_assumed_bias`.
    """
    source = read_model_weights(name, weights, progress=progress)
    if source.folder is not None:
        merged = {**source.options, **options}
        source.check_model(name, merged)
        if "num_classes" not in merged:
            merged["num_classes"] = _num_classes(build, merged, source)
    else:
        merged = dict(options)
    model = build(merged)
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    label = f"{source.label}, loaded with {listed}," if listed else source.label
    if not load_weights(model, source.state, label, new_classifier="num_classes" in options):
        warn_of_assumed_bias(model, source, name, merged, stacklevel=4)
    _set_transform(model, source)
    return model


def with_num_classes(source: WeightsSource) -> WeightsSource:
    """Add the number of classes to the options; unless it is known, it is read off the weights."""
    assert source.model_name is not None
    if "num_classes" in source.options:
        return source
    name = source.model_name
    counted = _num_classes(lambda options: build_model(name, options), source.options, source)
    return replace(source, options={**source.options, "num_classes": counted})


def build_from_source(source: WeightsSource) -> nn.Module:
    """Build the model that a source describes, with its weights and its inference transform.

    Args:
        source: Names its model.

    Returns:
        The model in training mode.

    Raises:
        ValueError: Unknown model or option, or the weights don't fit.

    Warns:
        UserWarning: As for :func:`warn_of_assumed_bias`.
    """
    source = with_num_classes(source)
    assert source.model_name is not None
    model = build_model(source.model_name, source.options)
    load_weights(model, source.state, source.label)
    warn_of_assumed_bias(model, source, source.model_name, source.options, stacklevel=4)
    _set_transform(model, source)
    return model


def warn_of_assumed_bias(
    model: nn.Module, source: WeightsSource, name: str, options: Mapping[str, object], stacklevel: int = 2
) -> None:
    """Warn if the weights may have been trained with another logit bias than the model's: no state dict holds it.

    An official network whose classifier is replaced keeps the logit bias of its 1000 classes.

    Args:
        model: Has all of the weights.
        source: The weights; a folder describes the bias too.
        name: Model name.
        options: Its options.
        stacklevel: As for :func:`warnings.warn`.
    """
    layer = next((module for module in model.modules() if isinstance(module, LogitLayer)), None)
    is_described = source.folder is not None or source.is_official or options.get("logit_bias") is not None
    if is_described or layer is None or name not in RECORDS or model.num_classes == (n := RECORDS[name].num_classes):
        return
    warnings.warn(
        f"{source.label} doesn't record its logit bias: {layer.logit_bias:.4f} is assumed, the default for "
        f"{model.num_classes} classes; if its classifier was replaced after training on {n} classes, set "
        f"logit_bias={-math.log(n - 1):.4f}, or its probabilities change",
        stacklevel=stacklevel,
    )


def _num_classes(
    build: Callable[[Mapping[str, object]], nn.Module], options: Mapping[str, object], source: WeightsSource
) -> int:
    with torch.device("meta"):  # allocates nothing and draws no random numbers
        return count_classes(build(options), source.state, source.label)


def _set_transform(model: nn.Module, source: WeightsSource) -> None:
    if source.preprocessing is not None:
        model.transform = source.preprocessing.transform()  # type: ignore[assignment]
