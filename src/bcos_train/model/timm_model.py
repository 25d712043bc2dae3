"""Models of timm as baselines. timm is imported on demand."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import v2

from bcos_train.dataset.encoding import BcosEncoding
from bcos_train.model.transform import InferenceTransform
from bcos_train.utils.suggestions import suggest

__all__ = ["timm_model"]


def timm_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    pretrained: bool = False,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    model_args: Mapping[str, object] | None = None,
) -> nn.Module:
    """Build a model of timm (``timm.list_models()``).

    Args:
        name: timm's name, such as ``"convnext_tiny"``, optionally with the tag of its weights: ``"resnet18.a1_in1k"``.
        num_classes: K.
        in_chans: C: 3 for standardized RGB, 6 for ``[r, g, b, 1-r, 1-g, 1-b]``.
        pretrained: Download and load timm's weights; for another K, all except the classifier.
        drop_rate: Dropout probability before the classifier; ``None``: the model's default.
        drop_path_rate: Probability of stochastic depth; ``None``: the model's default.
        model_args: Further keywords of the model, such as ``{img_size: 32}`` for a ViT or ``{act_layer: gelu}``.

    Returns:
        timm's model ``(N, C, H, W) -> (N, K)`` with three more attributes, which all models here have: ``in_chans``,
        ``to_probabilities`` (softmax) and ``transform`` (PIL image -> ``(C, H, W)``: timm's transform for the model's
        weights; with 6 channels ImageNet's, encoded).

    Raises:
        ValueError: Unknown name, tag or keyword, or timm rejects a value.
    """
    from timm import create_model

    _check_name(name)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least 1")
    if in_chans not in (3, 6):
        raise ValueError(f"in_chans={in_chans}: 3 for standardized RGB or 6 for [r, g, b, 1-r, 1-g, 1-b]")
    reserved = {*inspect.signature(timm_model).parameters, *inspect.signature(create_model).parameters} - {"kwargs"}
    for key in model_args or {}:
        # Also files and URLs: a config must not load weights from arbitrary places.
        if key in reserved or key.startswith("pretrained"):
            raise ValueError(f"model_args.{key}: not a keyword of timm's {name} itself")
    options: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, **(model_args or {})}
    try:
        model: Any = create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)
    except (TypeError, AssertionError) as error:
        set_options = {key: value for key, value in options.items() if value is not None}
        raise ValueError(f"timm's {name} can't be built with {set_options} ({error})") from error
    model.in_chans = in_chans
    model.to_probabilities = _softmax
    model.transform = _transform(model) if in_chans == 3 else InferenceTransform(256, 224, BcosEncoding())
    return model


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _transform(model: nn.Module) -> v2.Compose:
    from timm.data import create_transform, resolve_model_data_config

    return v2.Compose([v2.RGB(), create_transform(**resolve_model_data_config(model))])


def _check_name(name: str) -> None:
    """Raise a ValueError that names the nearest name if timm has no such model or tag."""
    from timm import list_models
    from timm.models import get_arch_pretrained_cfgs

    architecture, _, tag = name.partition(".")
    known = list_models()
    if architecture not in known:
        raise ValueError(f"unknown timm model {name!r}{suggest(architecture, known)}; see timm.list_models()")
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ValueError(f"timm's {architecture} has no weights {tag!r}{suggest(tag, tags)}; it has: {', '.join(tags)}")


def _config_signature(node: Mapping[str, object]) -> inspect.Signature:
    """Return the signature of :func:`timm_model`, after checking the model name of the config."""
    if isinstance(name := node.get("name"), str) and name != "???":
        _check_name(name)
    return inspect.signature(timm_model)


timm_model.config_signature = _config_signature  # type: ignore[attr-defined]
