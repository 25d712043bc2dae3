"""Register the models in timm: ``timm.create_model("bcos_resnet50", pretrained=True, num_classes=10)``.

Every B-cos model is registered as ``bcos_<name>``, and the official standard ViTs under their own names. Official
weights come from this package's loader, which verifies them, never from timm's download.

``import bcos_train.timm`` imports this module, and with it timm; nothing else does.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from timm.models import (
    FeatureDictNet,
    FeatureHookNet,
    FeatureListNet,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from bcos_train.explanation import evaluating
from bcos_train.model import Bottleneck, create_model, list_models, model_signature
from bcos_train.model.base import resolve_pooling
from bcos_train.model.conv_net import BcosConvNet
from bcos_train.model.grad_checkpointing import set_grad_checkpointing
from bcos_train.model.intermediates import check_indices, last_of_each_resolution
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.weights.records import RECORDS, timm_name

FeatureClass = Literal["list", "dict", "hook"]

#: Prefixes of model names -> first and last layer with weights, as in the state dict.
_LAYERS = {
    ("resne", "wide_resnet"): ("conv1.linear", "fc.linear"),
    ("densenet",): ("features.conv0.linear", "classifier.linear"),
    ("vgg",): ("features.0.linear", "classifier.2.linear"),
    ("convnext",): ("features.0.linear", "classifier.1.linear"),
    ("simple_vit",): ("0.to_patch_embedding.linear.linear", "0.linear_head.linear.linear"),
    ("plain_cnn",): ("0.linear", "8.linear"),
    ("vitc",): ("0.to_patch_embedding.conv_stem.0.linear", "0.linear_head.linear.linear"),
    ("standard_simple_vit",): ("to_patch_embedding.linear", "linear_head.linear"),
    ("standard_vitc",): ("to_patch_embedding.conv_stem.0", "linear_head.linear"),
}
_INPUT = (
    "The input is [r, g, b, 1-r, 1-g, 1-b] in [0, 1]: model.transform converts an image to it. timm's own transforms, "
    "with the mean and std given here, produce the first three channels."
)


def _default_cfg(name: str) -> dict[str, Any]:
    """Return the model's entry in timm's registry, which must exist before a model is built."""
    options = {key: parameter.default for key, parameter in model_signature(name).parameters.items()}
    is_small = options["num_classes"] == 10  # the networks for CIFAR-10
    size = 32 if is_small else 224
    resized = 232 if name.endswith("_long") or name.startswith("convnext") else 256
    is_bcos = not name.startswith("standard_")
    cfg: dict[str, Any] = {
        "input_size": (options["in_chans"], size, size),
        "num_classes": options["num_classes"],
        "crop_pct": 1.0 if is_small else 224 / resized,
        "interpolation": "bilinear",
        "origin_url": "https://github.com/B-cos/B-cos-v2",
        "paper_name": "B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers",
        "paper_ids": "arXiv:2306.10898",
    }
    if is_bcos:
        cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "notes": (_INPUT,)}
    for prefixes, layers in _LAYERS.items():
        if name.startswith(prefixes):
            cfg["first_conv"], cfg["classifier"] = layers
    if not name.removeprefix("standard_").startswith(("simple_vit", "vitc")):
        cfg["pool_size"] = (8, 8) if is_small else (7, 7)
    if name in RECORDS:
        record = RECORDS[name]
        # timm has no key for the hash; the URL has it before the suffix, as in torch.hub.
        notes = (f"The SHA-256 of the weights begins with {record.sha256}.", *cfg.get("notes", ()))
        cfg |= {"url": record.url, "license": record.license.lower(), "notes": notes}
    return cfg


def _create(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | dict[str, object] | None = None,
    pretrained_cfg_overlay: dict[str, object] | None = None,
    pretrained_model_args: dict[str, object] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: FeatureClass = "list",
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    output_stride: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model for timm's factory.

    Args:
        name: Model name in this package.
        pretrained: Load weights: those of a file, folder or Hub repository if the configuration names one, else the
            official ones, verified.
        pretrained_cfg, pretrained_cfg_overlay, pretrained_model_args, cache_dir: Passed on by timm's factory.
        features_only: Return the feature maps of each resolution instead of logits (convolutional networks only).
        out_indices: With ``features_only``, indices of the feature maps; an integer: the last so many; ``None``: all.
        feature_cls: With ``features_only``, timm's class: feature maps as a list or by name.
        drop_rate: Dropout before the classifier; timm's scripts always pass it. Must be 0 except for DenseNets.
        drop_path_rate: timm's name for ``stochastic_depth_prob``; must be 0 for networks without it.
        global_pool: ``"avg"``, or ``""`` with ``num_classes=0``, see ``reset_classifier``.
        output_stride: Stride of the last feature map. Dilation can reduce it in ResNets with bottleneck blocks.
        options: As for :func:`bcos_train.create_model`; ``num_classes`` may be 0.

    Raises:
        ValueError: The model lacks the option or doesn't take its value; the message names the nearest valid name.
    """
    timm_id = str(timm_name(name))
    known = [*model_signature(name).parameters, "pretrained", "features_only", "out_indices", "feature_cls"]
    if drop_path_rate is not None and "stochastic_depth_prob" in known:
        options["stochastic_depth_prob"] = drop_path_rate
    elif drop_path_rate:
        raise ValueError(
            f"drop_path_rate={drop_path_rate}: {timm_id} has no stochastic depth; B-cos ResNets and ConvNeXts have"
        )
    if drop_rate and "drop_rate" in known:
        options["drop_rate"] = drop_rate
    elif drop_rate:
        raise ValueError(f"drop_rate={drop_rate}: {timm_id} has no dropout before its classifier")
    pooling = resolve_pooling(0 if features_only else options.get("num_classes", 1), global_pool)
    if output_stride is not None:
        options |= _dilation(name, output_stride, options)
    for key in options:
        if key not in known:
            raise ValueError(f"{timm_id} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")
    if not features_only and out_indices is not None:
        raise ValueError(f"out_indices={out_indices} needs features_only=True")

    cfg = resolve_pretrained_cfg(timm_id, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    weights, loaded_by_timm = _resolve_weights(timm_id, name, cfg) if pretrained else (None, False)
    if cache_dir is not None and weights == "official":
        raise ValueError(
            f"cache_dir={cache_dir}: official weights are cached under the environment variable TORCH_HOME"
        )
    if pretrained_model_args is not None:  # older versions of timm don't have this parameter
        options["pretrained_model_args"] = pretrained_model_args
    model = build_model_with_cfg(
        partial(_build, name, weights, pooling),
        timm_id,
        pretrained=loaded_by_timm,
        pretrained_cfg=cfg,
        cache_dir=cache_dir,
        **options,
    )
    return _feature_net(model, out_indices, feature_cls) if features_only else model


def _resolve_weights(timm_id: str, name: str, cfg: Mapping[str, object]) -> tuple[str | None, bool]:
    """Return ``weights`` for ``create_model``, and True if timm is to load the weights instead."""
    if cfg.get("source") in ("hf-hub", "local-dir") or cfg.get("state_dict") or cfg.get("hf_hub_id"):
        return None, True  # the user's weights, as written by timm.models.push_to_hf_hub
    if cfg.get("file"):
        return str(cfg["file"]), False
    official = RECORDS[name].url if name in RECORDS else None
    if cfg.get("url") != official:
        raise ValueError(
            f"{timm_id}: weights are not loaded from {cfg.get('url')}, because they can't be verified; "
            "download the file and set pretrained_cfg_overlay={'file': <path>}"
        )
    return "official", False


def _dilation(name: str, output_stride: int, options: Mapping[str, object]) -> dict[str, list[bool]]:
    """Return the options for which the last feature map has this stride."""
    timm_id, cfg = timm_name(name), _default_cfg(name)
    chosen = {key: parameter.default for key, parameter in model_signature(name).parameters.items()} | dict(options)
    if "pool_size" not in cfg:
        raise ValueError(f"output_stride={output_stride}: {timm_id} has tokens, not feature maps with a stride")
    if chosen.get("replace_stride_with_dilation") is not None:
        raise ValueError("output_stride and replace_stride_with_dilation have the same effect: set only one of them")
    stride, stages, hint = cfg["input_size"][-1] // cfg["pool_size"][-1], 1, ""
    if chosen.get("block") is Bottleneck:
        stages = len(chosen["layers"])
        stride = 2 ** (stages - 1) * (1 if chosen["small_inputs"] else 4)
    else:
        hint = "; ResNets with bottleneck blocks, such as bcos_resnet50, allow a smaller one"
    allowed = [stride >> halvings for halvings in range(stages)]
    if output_stride not in allowed:
        raise ValueError(f"output_stride={output_stride}: {timm_id} allows {join_words(map(str, allowed))}{hint}")
    dilated = allowed.index(output_stride)
    replace = [False] * (stages - 1 - dilated) + [True] * dilated
    return {"replace_stride_with_dilation": replace} if dilated else {}


def _build(name: str, weights: str | None, pooling: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Call ``create_model``, with timm's meaning of ``num_classes=0``: no classifier."""
    if num_classes:
        options["num_classes"] = num_classes
    model = create_model(name, weights=weights, **options)
    if not num_classes:
        model.reset_classifier(0, pooling)  # type: ignore[operator]
    return model


def _feature_net(model: nn.Module, out_indices: int | Sequence[int] | None, feature_cls: FeatureClass) -> nn.Module:
    """Return timm's feature network, which shares its modules with ``model``.

    It has one feature map per resolution, from the last module at that resolution, as in timm's own ResNet, ConvNeXt,
    DenseNet and VGG.
    """
    if not isinstance(model, BcosConvNet):
        raise ValueError(f"features_only=True: {type(model).__name__} has no feature maps at several resolutions")
    kinds: dict[str, Callable[..., nn.Module]] = {
        "list": FeatureListNet,
        "dict": FeatureDictNet,
        "hook": FeatureHookNet,
    }
    if feature_cls not in kinds:
        raise ValueError(f"feature_cls={feature_cls!r}: one of {', '.join(kinds)}")
    trunk, info = _trunk(model)
    chosen = check_indices(len(info), out_indices, "out_indices", "feature maps")
    trunk.feature_info = info  # type: ignore[assignment]
    net = kinds[feature_cls](trunk, out_indices=tuple(chosen), flatten_sequential="." in info[0]["module"])
    # As in timm: keys of the classifier make no sense here.
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ("num_classes", "classifier")}  # type: ignore[operator, union-attr]
    for key, value in {"pretrained_cfg": cfg, "default_cfg": cfg, "in_chans": model.in_chans}.items():
        setattr(net, key, value)
    # timm's own checkpointing would count each batch twice in the running statistics.
    net.set_grad_checkpointing = partial(set_grad_checkpointing, net)  # type: ignore[assignment]
    return net


class FeatureInfo(TypedDict):
    """timm's description of a feature map: number of channels, stride, and name of the module that returns it."""

    num_chs: int
    reduction: int
    module: str


def _trunk(model: BcosConvNet) -> tuple[nn.Module, list[FeatureInfo]]:
    """Return the modules before the classifier, by name and in order, and timm's ``feature_info``.

    Channels and reductions are measured on an image of 64 x 64 pixels.
    """
    names = {id(module): name for name, module in model.named_modules()}
    reference = next(model.parameters())
    size = 64
    x = torch.zeros(1, model.in_chans, size, size, device=reference.device, dtype=reference.dtype)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    info: list[FeatureInfo] = []
    modules = list(model.get_feature_extractor().children())
    ends = last_of_each_resolution(modules)
    with torch.no_grad(), evaluating(model):
        for index, module in enumerate(modules):
            x = module(x)
            name = names[id(module)]
            top = name.partition(".")[0]
            parts[top] = model.get_submodule(top)
            if index in ends:
                info.append(FeatureInfo(num_chs=x.shape[1], reduction=size // x.shape[-1], module=name))
    return nn.Sequential(parts), info


def _entry(name: str, timm_id: str) -> Callable[..., nn.Module]:
    """Return the function that timm's factory calls; timm registers it under its ``__name__``."""

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = timm_id
    entry.__doc__ = f"Build the model ``{name}`` of :func:`bcos_train.create_model`."
    return entry


_NAMES = {timm_id: name for name in list_models() if (timm_id := timm_name(name)) is not None}
#: Read by :func:`timm.models.register_model`.
default_cfgs = generate_default_cfgs({timm_id: _default_cfg(name) for timm_id, name in _NAMES.items()})
for _timm_id, _name in _NAMES.items():
    globals()[_timm_id] = register_model(_entry(_name, _timm_id))
