"""``config.json`` and the model card ``README.md`` of an exported folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bcos_train.model.preprocessing import Preprocessing
from bcos_train.runs.layout import LIBRARY
from bcos_train.weights.model_options import TIMM
from bcos_train.weights.records import timm_name
from bcos_train.weights.source import ExportConfig, WeightsSource

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

__all__ = ["export_config", "model_card"]

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
#: Data sets: name on the Hugging Face Hub, and name in prose.
_DATASETS = {"imagenet": ("imagenet-1k", "ImageNet"), "cifar10": ("cifar10", "CIFAR-10")}
#: Class names in a model card; ``config.json`` has all.
_MAX_CLASSES = 100
_METRICS = {
    "acc1": "top-1 accuracy [%]",
    "acc5": "top-5 accuracy [%]",
    "f1": "micro-F1 [%]",
    "map": "mAP [%]",
    "worst_group_acc1": "top-1 accuracy on the worst group [%]",
    "loss": "loss",
}


def export_config(
    source: WeightsSource, preprocessing: Preprocessing | None, in_chans: int, sha256: str
) -> ExportConfig:
    """Return the content of the folder's ``config.json``.

    It includes the keys that timm's loaders read: ``architecture``, ``model_args``, ``num_classes``, ``label_names``
    and ``pretrained_cfg``.

    Args:
        source: With the model's name and all its options.
        preprocessing: Inference transform of the model; ``None``: unknown.
        in_chans: Channels of the input.
        sha256: Digest of the weights file.
    """
    assert source.model_name is not None
    options = dict(source.options)
    config = {
        "library_name": LIBRARY,
        "model_name": source.model_name,
        "architecture": _architecture(source.model_name),
        "num_classes": options.pop("num_classes"),
        "model_args": options,
        "averaged": source.is_ema,
        "activation": source.activation,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
        "pretrained_cfg": _timm_cfg(source, preprocessing, in_chans),
        "origin": source.origin,
        "is_official": source.is_official,
        "from_official": source.from_official,
        "dataset": source.dataset,
        "metrics": dict(source.metrics) or None,
        "n_images": source.n_images,
        "license": source.license,
        "sha256": sha256,
        "label_names": None if source.class_names is None else list(source.class_names),
    }
    return cast(ExportConfig, {key: value for key, value in config.items() if value is not None})


def _architecture(name: str) -> str:
    """Return the model's name in timm, if it has one."""
    return name.removeprefix(TIMM) if name.startswith(TIMM) else timm_name(name) or name


def _timm_cfg(source: WeightsSource, preprocessing: Preprocessing | None, in_chans: int) -> dict[str, object]:
    cfg: dict[str, object] = {} if source.license is None else {"license": source.license}
    if preprocessing is None:
        return cfg
    size, crop = preprocessing.resize_size, preprocessing.crop_size
    if isinstance(size, int) and crop is not None:
        cfg |= {"input_size": [in_chans, crop, crop], "crop_pct": crop / size}
    # The complements of a B-cos network are no standardization: timm's own transforms produce the first three channels.
    mean, std = preprocessing.mean or (0.0, 0.0, 0.0), preprocessing.std or (1.0, 1.0, 1.0)
    return cfg | {"interpolation": preprocessing.interpolation, "mean": list(mean), "std": list(std)}


def model_card(source: WeightsSource, preprocessing: Preprocessing | None, n_params: int, is_explainable: bool) -> str:
    """Return the text of ``README.md``: front matter as the Hugging Face Hub reads it, then prose.

    The prose is the template ``model_card.md.jinja``.

    Args:
        source: With the model's name and all its options.
        preprocessing: As for :func:`export_config`.
        n_params: Number of parameters.
        is_explainable: True if the model is a B-cos network.

    Raises:
        ValueError: The package huggingface_hub or jinja2 is missing.
    """
    try:
        from huggingface_hub import ModelCard

        data = _card_data(source, is_explainable)
        values = _template_values(source, preprocessing, n_params, is_explainable)
        card = ModelCard.from_template(data, template_path=str(_TEMPLATE), **values)
    except ImportError as error:
        raise ValueError(f"a model card needs huggingface_hub and jinja2: pip install both ({error})") from error
    return f"{str(card).rstrip()}\n"


def _card_data(source: WeightsSource, is_explainable: bool) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    tags = ["image-classification", "pytorch"]
    dataset, results = _DATASETS.get(source.dataset or ""), _eval_results(source)
    return ModelCardData(
        license=source.license,
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=[*tags, "b-cos", "interpretability", "explainable-ai"] if is_explainable else tags,
        datasets=None if dataset is None else [dataset[0]],
        metrics=["accuracy"] if "acc1" in source.metrics else None,
        model_name=source.model_name if results else None,
        eval_results=results or None,
    )


def _eval_results(source: WeightsSource) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    if source.dataset is None:
        return []
    kind, name = _DATASETS.get(source.dataset, (source.dataset, source.dataset))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=kind,
            dataset_name=name,
            dataset_split="validation",
            dataset_args=None if source.n_images is None else {"images": source.n_images},
            metric_type="accuracy",
            metric_name=_METRICS[key],
            metric_value=source.metrics[key],
        )
        for key in ("acc1", "acc5")
        if key in source.metrics
    ]


def _template_values(
    source: WeightsSource, preprocessing: Preprocessing | None, n_params: int, is_explainable: bool
) -> dict[str, Any]:
    """Return the variables of the template; numbers are formatted, everything else is as in the source."""
    assert source.model_name is not None
    return {
        "name": source.model_name,
        "kind": "A B-cos network" if is_explainable else "An image classifier",
        "n_params": f"{n_params:,}",
        "num_classes": f"{source.options['num_classes']:,}",
        "dataset": _DATASETS.get(source.dataset or "", ("", source.dataset))[1],
        "is_imagenet": source.dataset == "imagenet",
        "origin": source.origin,
        "is_ema": source.is_ema,
        "from_official": source.from_official,
        "is_explainable": is_explainable,
        "is_timm": source.model_name.startswith(TIMM),
        "options": {key: json.dumps(value) for key, value in source.options.items()},
        "class_names": [json.dumps(name, ensure_ascii=False) for name in (source.class_names or ())[:_MAX_CLASSES]],
        "n_more_classes": max(0, len(source.class_names or ()) - _MAX_CLASSES),
        "preprocessing": "That of the model in timm." if preprocessing is None else preprocessing.to_sentence(),
        "results": {_METRICS.get(key, key): f"{value:.6g}" for key, value in source.metrics.items()},
        "results_origin": "Published by the authors" if source.is_official else "On the validation set",
        "n_images": None if source.n_images is None else f"{source.n_images:,}",
        "weights_license": source.license,
        "cites_papers": is_explainable or source.is_official,
    }
