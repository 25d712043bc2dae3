"""Models by name.

A model's builder is a callable whose keyword parameters are the model's options; their names and defaults are read
from its signature, so they are defined in one place. Reading weights is the task of :mod:`bcos_train.weights`, which
this package doesn't import: it registers its loader here.
"""

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from bcos_train.model.grad_checkpointing import set_grad_checkpointing
from bcos_train.nn import Backend, set_backend
from bcos_train.utils.suggestions import suggest

#: Builds a model with random weights from its options.
Builder = Callable[..., nn.Module]

#: Value of ``weights`` for the official ImageNet weights.
OFFICIAL = "official"


class WeightsLoader(Protocol):
    """Build a model with weights; see :func:`bcos_train.weights.build.build_with_weights`."""

    def __call__(
        self,
        name: str,
        weights: str | os.PathLike[str],
        options: Mapping[str, object],
        build: Callable[[Mapping[str, object]], nn.Module],
        *,
        progress: bool,
    ) -> nn.Module: ...


_BUILDERS: dict[str, Builder] = {}
_PRETRAINED: list[str] = []
_WEIGHTS_LOADERS: list[WeightsLoader] = []


def register_model(name: str, builder: Builder) -> None:
    """Register a model.

    Args:
        name: Name for :func:`create_model`.
        builder: ``builder(**options)`` returns the model with random weights.

    Raises:
        ValueError: The name is taken.
    """
    if name in _BUILDERS:
        raise ValueError(f"a model named {name!r} is already registered")
    _BUILDERS[name] = builder


def register_weights_loader(loader: WeightsLoader, pretrained: Collection[str]) -> None:
    """Register the function that builds models with weights.

    Args:
        loader: Replaces an earlier one.
        pretrained: Names of the models that have official weights.

    Raises:
        ValueError: Unknown model.
    """
    for name in pretrained:
        model_signature(name)
    _WEIGHTS_LOADERS[:], _PRETRAINED[:] = [loader], pretrained


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """List the names of all models, in the order of registration.

    Args:
        pattern: Shell-style pattern such as ``"resnet*"``.
        pretrained: List only models with official weights.
    """
    return [name for name in _BUILDERS if fnmatchcase(name, pattern) and (name in _PRETRAINED or not pretrained)]


def model_signature(name: str) -> inspect.Signature:
    """Return the options of a model: keyword parameters with their defaults.

    Raises:
        ValueError: Unknown model; the message names the nearest ones.
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
    **options: object,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of :func:`list_models`.
        pretrained: Load the official ImageNet weights, which are downloaded once and verified at each use
            (:mod:`bcos_train.weights.download`); the same as ``weights="official"``. ``list_models(pretrained=True)``
            names the models that have some.
        weights: ``"official"``; a ``.pth``, ``.safetensors`` or ``.ckpt`` file; or a folder with
            ``model.safetensors``. A run folder or exported folder also describes the options and the preprocessing of
            its weights, also for the weights files in it; they apply unless set here. ``None``: random weights.
        progress: Show a download progress bar.
        backend: How the layers compute, see :func:`bcos_train.nn.set_backend`.
        grad_checkpointing: In training, recompute the inside of each block in the backward pass instead of storing
            it: less memory, the same numbers (:mod:`bcos_train.model.grad_checkpointing`).
        options: Keyword parameters of the model, such as ``num_classes``, ``in_chans``, ``norm_layer``, ``b``,
            ``max_out``; see :func:`model_signature`. If ``num_classes`` differs from that of the weights, everything
            but the last layer is loaded; the last layer has the same random weights as without ``weights``.

    Returns:
        The model in training mode. Input ``(N, 6, H, W)`` in [0, 1], channels ``[r, g, b, 1-r, 1-g, 1-b]``; output
        logits ``(N, num_classes)``. ``model.transform`` converts a PIL image to the input ``(6, H, W)``: resize to 256
        (ConvNeXts and ``*_long``: 232) and center crop to 224; CIFAR networks take the image in its own size;
        standard models take standardized RGB.

    Raises:
        ValueError: Unknown model or option (the message names the nearest ones), weights that are missing or can't be
            downloaded, or weights that don't fit the model with these options or were trained with others.
    """
    known = model_signature(name).parameters
    for key in options:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")
    if pretrained and weights not in (None, OFFICIAL):
        raise ValueError(f"pretrained=True loads the official weights: set either that or weights={weights}, not both")
    if pretrained:
        weights = OFFICIAL
    if weights is None:
        return _build(name, options, backend, grad_checkpointing)
    assert _WEIGHTS_LOADERS, "bcos_train.weights registers its loader when bcos_train is imported"
    (load,) = _WEIGHTS_LOADERS

    def build(all_options: Mapping[str, object]) -> nn.Module:
        return _build(name, all_options, backend, grad_checkpointing)

    return load(name, weights, options, build, progress=progress)


def _build(name: str, options: Mapping[str, object], backend: Backend, grad_checkpointing: bool) -> nn.Module:
    model = _BUILDERS[name](**options)
    set_backend(model, backend)
    if grad_checkpointing:
        set_grad_checkpointing(model)
    return model


def _config_signature(node: Mapping[str, object]) -> inspect.Signature:
    """Return the keyword parameters of :func:`create_model` for the model that a config node names."""
    common = inspect.signature(create_model).parameters
    parameters = [common[key] for key in ("name", "pretrained", "weights", "backend", "grad_checkpointing")]
    if isinstance(name := node.get("name"), str):
        parameters += model_signature(name).parameters.values()
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])


create_model.config_signature = _config_signature  # type: ignore[attr-defined]
