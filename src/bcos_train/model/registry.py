"""Models by name.

A model's builder is a callable whose keyword parameters are the model's options; their names and defaults are read
from its signature, so there is one place where they are written.
"""

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bcos_train.suggest import suggest

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register_model(name: str, builder: Builder) -> None:
    """Add a model. ``builder(**options)`` returns it with random weights.

    Raises:
        ValueError: The name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"a model named {name!r} is registered already")
    _BUILDERS[name] = builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell-style pattern such as ``"resnet*"``, in the order of registration."""
    return [name for name in _BUILDERS if fnmatchcase(name, pattern)]


def model_signature(name: str) -> inspect.Signature:
    """The options of a model: keyword parameters with their defaults.

    Raises:
        ValueError: No such model; the message names the nearest ones.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}{suggest(name, _BUILDERS)}; see bcos_train.list_models()")
    return inspect.signature(_BUILDERS[name])


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of :func:`list_models`.
        pretrained: Load the official ImageNet weights.
        options: Keyword parameters of the model, such as ``num_classes``, ``in_chans``, ``norm_layer``, ``b``,
            ``max_out``; see :func:`model_signature`.

    Returns:
        The model in training mode. Input ``(N, 6, H, W)`` in [0, 1], channels ``[r, g, b, 1-r, 1-g, 1-b]``; output
        logits ``(N, num_classes)``. ``model.transform`` makes the input ``(6, H, W)`` of a PIL image: resize to 256
        and centre crop to 224, or for the CIFAR networks the image as it is; standard models get standardised RGB.

    Raises:
        ValueError: Unknown model or option; the message names the nearest ones.
    """
    known = model_signature(name).parameters
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")
    if pretrained:
        raise ValueError(f"official weights of {name} can't be loaded yet: pretrained=False")
    return _BUILDERS[name](**options)


def _config_signature(node: Mapping[str, Any]) -> inspect.Signature:
    """Keywords that :func:`create_model` takes for the model that a config node names."""
    own = inspect.signature(create_model).parameters
    parameters = [own["name"], own["pretrained"]]
    if isinstance(node.get("name"), str):
        parameters += model_signature(node["name"]).parameters.values()
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])


create_model.config_signature = _config_signature  # type: ignore[attr-defined]
