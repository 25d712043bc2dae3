"""Models by name, and their official weights.

A model's builder is a callable whose keyword parameters are the model's options; their names and defaults are read
from its signature, so there is one place where they are written. Where weights come from isn't known here: whoever
has some registers a function that reads them.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.model.recompute import set_grad_checkpointing
from bcos_train.model.source import TIMM, Source, differences, model_of_node, read_source
from bcos_train.model.timm_model import timm_model
from bcos_train.model.weights import count_classes, load_weights
from bcos_train.nn import Backend, set_backend
from bcos_train.suggest import join_words, nearest, suggest

Builder = Callable[..., nn.Module]
#: ``loader(progress)`` gives a state dict; ``progress`` says whether to show that of a download.
WeightsLoader = Callable[[bool], Mapping[str, Tensor]]

#: The value of ``weights`` that stands for those that are registered.
OFFICIAL = "official"

_BUILDERS: dict[str, Builder] = {}
_LOADERS: dict[str, WeightsLoader] = {}


def register_model(name: str, builder: Builder) -> None:
    """Add a model. ``builder(**options)`` returns it with random weights.

    Raises:
        ValueError: The name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"a model named {name!r} is registered already")
    _BUILDERS[name] = builder


def register_weights(name: str, loader: WeightsLoader) -> None:
    """Add the official weights of a model.

    Raises:
        ValueError: Unknown model, or it has some already.
    """
    model_signature(name)
    if name in _LOADERS:
        raise ValueError(f"official weights of {name!r} are registered already")
    _LOADERS[name] = loader


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names of all models that match a shell-style pattern such as ``"resnet*"``, in the order of registration.

    With ``pretrained`` only those that have official weights.
    """
    return [name for name in _BUILDERS if fnmatchcase(name, pattern) and (name in _LOADERS or not pretrained)]


def model_signature(name: str) -> inspect.Signature:
    """The options of a model: keyword parameters with their defaults.

    Raises:
        ValueError: No such model; the message names the nearest ones.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}{suggest(name, _BUILDERS)}; see bcos_train.list_models()")
    return inspect.signature(_BUILDERS[name])


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    progress: bool = True,
    backend: Backend = "fused",
    grad_checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of :func:`list_models`.
        pretrained: Load the official ImageNet weights, which are downloaded once and verified at each use
            (:mod:`bcos_train.weights.download`); the same as ``weights="official"``. Names of models that have some:
            ``list_models(pretrained=True)``.
        weights: ``"official"``; a ``.pth``, ``.safetensors`` or ``.ckpt`` file; or a folder with
            ``model.safetensors``. The folder of a run or an export also says for which options and preprocessing its
            weights are, those in a single file of it too: what isn't given is as it says. ``None``: random weights.
        progress: Show that of a download.
        backend: How the layers compute, see :func:`bcos_train.nn.set_backend`.
        grad_checkpointing: In training, compute the inside of each block again in the backward pass rather than keep
            it: less memory, the same numbers (:mod:`bcos_train.model.recompute`).
        options: Keyword parameters of the model, such as ``num_classes``, ``in_chans``, ``norm_layer``, ``b``,
            ``max_out``; see :func:`model_signature`. With weights and another ``num_classes`` than theirs, everything
            but the last layer is loaded, and that has the same random weights as without ``weights``.

    Returns:
        The model in training mode. Input ``(N, 6, H, W)`` in [0, 1], channels ``[r, g, b, 1-r, 1-g, 1-b]``; output
        logits ``(N, num_classes)``. ``model.transform`` makes the input ``(6, H, W)`` of a PIL image: resize to 256
        (the ConvNeXts and ``*_long`` to 232) and centre crop to 224, or for the CIFAR networks the image as it is;
        standard models get standardised RGB.

    Raises:
        ValueError: Unknown model or option (the message names the nearest ones), no weights or such that can't be
            had, or weights that don't fit the model with these options or were trained with others.
    """
    known = model_signature(name).parameters
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")
    if pretrained and weights not in (None, OFFICIAL):
        raise ValueError(f"pretrained=True means the official weights: give it or weights={weights}, not both")
    if pretrained:
        weights = OFFICIAL
    if weights is None:
        return _build(name, options, backend, grad_checkpointing)
    found = _find(name, weights, None, progress)
    given = {**found.options, **options}
    _check_described(found, name, given, weights)
    if found.name is not None and "num_classes" not in given:
        with torch.device("meta"):  # draws no random numbers
            given["num_classes"] = count_classes(_BUILDERS[name](**given), found.state)
    model = _build(name, given, backend, grad_checkpointing)
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    origin = _called(name, weights)
    origin = f"{origin}, loaded with {listed}," if listed else origin
    load_weights(model, found.state, origin, new_classifier="num_classes" in options)
    if found.preprocessing is not None:
        model.transform = found.preprocessing.transform()  # type: ignore[assignment]
    return model


def _build(name: str, options: Mapping[str, Any], backend: Backend, grad_checkpointing: bool) -> nn.Module:
    model = _BUILDERS[name](**options)
    set_backend(model, backend)
    if grad_checkpointing:
        set_grad_checkpointing(model)
    return model


def _find(name: str, weights: str | os.PathLike[str], use_ema: bool | None, progress: bool) -> Source:
    if weights == OFFICIAL:
        loader = _official_loader(name)
        if use_ema:
            raise ValueError("official weights come without averaged ones: use_ema=false")
        return Source(state=loader(progress), is_ema=False, origin=OFFICIAL)
    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"weights={weights}: no such file{suggest(str(weights), [OFFICIAL])}")
    return read_source(path, use_ema)


def _called(name: str, weights: str | os.PathLike[str]) -> str:
    return f"the official file of {name}" if weights == OFFICIAL else str(weights)


def _check_described(found: Source, name: str, options: Mapping[str, Any], weights: str | os.PathLike[str]) -> None:
    """Raise a ValueError if weights are known to be of another model, or of one that is another function."""
    if found.name is None:
        return
    if found.name != name:
        raise ValueError(f"{weights} holds weights of {found.name}, not of {name}")
    known: Mapping[str, inspect.Parameter] = {}
    if name in _BUILDERS or name.startswith(TIMM):
        known = (inspect.signature(timm_model) if name.startswith(TIMM) else model_signature(name)).parameters
    defaults = {key: p.default for key, p in known.items() if p.default is not p.empty}
    if text := differences(found, options, defaults):
        raise ValueError(f"weights={weights} {text}")


def find_weights(
    name: str,
    weights: str | os.PathLike[str],
    *,
    use_ema: bool | None = None,
    progress: bool = True,
    node: Mapping[str, Any] | None = None,
) -> tuple[Mapping[str, Tensor], bool, str]:
    """The state dict that ``weights`` stands for.

    Args:
        name: The model.
        weights: As for :func:`create_model`.
        use_ema: As for :func:`bcos_train.model.weights.read_weights`.
        progress: Show that of a download.
        node: A config's node of the model that the weights are for, if they are to be checked against it.

    Returns:
        The state dict, whether it is that of an average, and what to call it in a message.

    Raises:
        ValueError: Unknown model, or one without official weights (the message names the nearest that have some),
            the weights can't be had, or they are known to be of a model with other options than ``node`` says.
    """
    found = _find(name, weights, use_ema, progress)
    if node is not None:
        _check_described(found, *model_of_node(node), weights)
    return found.state, found.is_ema, _called(name, weights)


def _official_loader(name: str) -> WeightsLoader:
    model_signature(name)
    if name not in _LOADERS:
        near = nearest(name, list_models(pretrained=True))
        verb = "has" if len(near) == 1 else "have"
        hint = f"near it, {join_words(near, 'and')} {verb}" if near else "list_models(pretrained=True) names those with"
        raise ValueError(f"{name} has no official weights; {hint}")
    return _LOADERS[name]


def _config_signature(node: Mapping[str, Any]) -> inspect.Signature:
    """Keywords that :func:`create_model` takes for the model that a config node names."""
    own = inspect.signature(create_model).parameters
    parameters = [own["name"], own["pretrained"], own["weights"], own["backend"], own["grad_checkpointing"]]
    if isinstance(node.get("name"), str):
        parameters += model_signature(node["name"]).parameters.values()
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])


create_model.config_signature = _config_signature  # type: ignore[attr-defined]
