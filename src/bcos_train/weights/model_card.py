"""``config.json`` and ``README.md`` of an exported folder."""

import json
from collections.abc import Mapping
from typing import Any

from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.source import LIBRARY, TIMM
from bcos_train.weights.export_source import Source
from bcos_train.weights.records import timm_name

__all__ = ["export_config", "model_card"]

#: The Hub's names of data sets, and how people write them.
_DATASETS = {"imagenet": ("imagenet-1k", "ImageNet"), "cifar10": ("cifar10", "CIFAR-10")}
_METRICS = {"acc1": "top-1 accuracy [%]", "acc5": "top-5 accuracy [%]", "loss": "loss"}
_CITATION = """@inproceedings{boehle2022bcos,
  title = {B-cos Networks: Alignment is All We Need for Interpretability},
  author = {Moritz B{\\"o}hle and Mario Fritz and Bernt Schiele},
  booktitle = {CVPR},
  year = {2022},
  eprint = {2205.10268},
  archiveprefix = {arXiv}
}
@article{boehle2024bcos,
  title = {B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers},
  author = {Moritz B{\\"o}hle and Navdeeppal Singh and Mario Fritz and Bernt Schiele},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2024},
  eprint = {2306.10898},
  archiveprefix = {arXiv}
}"""


def export_config(source: Source, preprocessing: Preprocessing | None, in_chans: int, sha256: str) -> dict[str, Any]:
    """What the folder's ``config.json`` holds.

    timm's loaders find there what they look for: ``architecture``, ``model_args``, ``num_classes``, ``label_names``
    and ``pretrained_cfg``.

    Args:
        source: With the model's name and all its options.
        preprocessing: Of the model; ``None``: not known.
        in_chans: Channels of the input.
        sha256: Of the file of weights.
    """
    assert source.name is not None
    options = dict(source.options)
    config = {
        "library_name": LIBRARY,
        "model_name": source.name,
        "architecture": _architecture(source.name),
        "num_classes": options.pop("num_classes"),
        "model_args": options,
        "averaged": source.is_ema,
        "preprocessing": None if preprocessing is None else preprocessing.to_json(),
        "pretrained_cfg": _timm_cfg(source, preprocessing, in_chans),
        "origin": source.origin,
        "is_official": source.is_official,
        "began_official": source.began_official,
        "dataset": source.dataset,
        "metrics": dict(source.metrics) or None,
        "n_images": source.n_images,
        "license": source.licence,
        "sha256": sha256,
        "label_names": None if source.class_names is None else list(source.class_names),
    }
    return {key: value for key, value in config.items() if value is not None}


def _architecture(name: str) -> str:
    """The model's name in timm, if it has one."""
    if name.startswith(TIMM):
        return name.removeprefix(TIMM)
    return timm_name(name) or name


def _timm_cfg(source: Source, preprocessing: Preprocessing | None, in_chans: int) -> dict[str, Any]:
    cfg: dict[str, Any] = {} if source.licence is None else {"license": source.licence}
    if preprocessing is None:
        return cfg
    size, crop = preprocessing.resize_size, preprocessing.crop_size
    if isinstance(size, int) and crop is not None:
        cfg |= {"input_size": [in_chans, crop, crop], "crop_pct": crop / size}
    # A B-cos network's complements are no standardisation: timm's own transforms make the first three channels.
    mean, std = preprocessing.mean or (0.0, 0.0, 0.0), preprocessing.std or (1.0, 1.0, 1.0)
    return cfg | {"interpolation": preprocessing.interpolation, "mean": list(mean), "std": list(std)}


def model_card(source: Source, preprocessing: Preprocessing | None, n_params: int, can_explain: bool) -> str:
    """The text of ``README.md``: a front matter as the Hugging Face Hub reads it, then prose.

    Args:
        source: With the model's name and all its options.
        preprocessing: As for :func:`export_config`.
        n_params: Number of parameters.
        can_explain: Whether the model has ``explain``.

    Raises:
        ValueError: The package huggingface_hub is missing.
    """
    try:
        from huggingface_hub import ModelCardData
    except ModuleNotFoundError as error:
        raise ValueError("a model card needs the package huggingface_hub: pip install huggingface_hub") from error
    tags = ["image-classification", "pytorch"]
    dataset, results = _DATASETS.get(source.dataset or ""), _results(source)
    data = ModelCardData(
        license=source.licence,
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=[*tags, "b-cos", "interpretability", "explainable-ai"] if can_explain else tags,
        datasets=None if dataset is None else [dataset[0]],
        metrics=["accuracy"] if "acc1" in source.metrics else None,
        model_name=None if results is None else source.name,
        eval_results=results,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{_prose(source, preprocessing, n_params, can_explain)}"


def _results(source: Source) -> Any:
    from huggingface_hub import EvalResult

    if source.dataset is None:
        return None
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
    ] or None


def _prose(source: Source, preprocessing: Preprocessing | None, n_params: int, can_explain: bool) -> str:
    assert source.name is not None
    dataset = _DATASETS.get(source.dataset or "", ("", source.dataset))[1]
    what = "A B-cos network" if can_explain else "An image classifier"
    about = [
        f"{what}, `{source.name}` of bcos-train, with {n_params:,} parameters and "
        f"{source.options['num_classes']:,} classes" + (f", trained on {dataset}." if dataset else ".")
    ]
    if can_explain:
        about.append(
            "Each logit is, but for a constant, a linear map W(x) of the input x, and so W(x) explains it completely."
        )
    about.append(f"Weights: {source.origin}{', the moving average over training' if source.is_ema else ''}.")
    if source.began_official:
        about.append("Training began with the official B-cos weights (Apache-2.0).")
    sections = [f"# {source.name}", "\n".join(about), "## Use", _usage(source.name, can_explain)]
    settings = "\n".join(f"- `{key}`: {json.dumps(value)}" for key, value in source.options.items())
    sections += ["## Options", settings, "## Preprocessing"]
    sections.append("That of the model in timm." if preprocessing is None else preprocessing.describe())
    sections += ["## Results", _table(source.metrics, source), "## Licence", _licence(source)]
    if can_explain or source.is_official:
        sections += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(sections) + "\n"


def _usage(name: str, can_explain: bool) -> str:
    lines = [
        "import torch",
        "from PIL import Image",
        "",
        "from bcos_train.weights import load_exported",
        "",
        'folder = "."  # where this file lies; of the Hub: huggingface_hub.snapshot_download("<user>/<repository>")',
        "model = load_exported(folder).eval()",
        'x = model.transform(Image.open("image.jpg"))[None]',
        "with torch.no_grad():",
        "    probabilities = model.to_probabilities(model(x))",
    ]
    if can_explain:
        lines += ["", 'explanation = model.explain(x)["explanation"]  # RGBA, (H, W, 4) in [0, 1]']
    text = "\n".join(["```python", *lines, "```"])
    if not name.startswith(TIMM):
        text += (
            f'\n\n`bcos_train.create_model("{name}", weights=folder, …)` loads the same weights into a model with the '
            "options given there; those of this one are listed below."
        )
    return text


def _table(metrics: Mapping[str, float], source: Source) -> str:
    if not metrics:
        return "None are recorded for these weights."
    origin = "Published by the authors" if source.is_official else "On the validation set"
    part = "" if source.n_images is None else f", {source.n_images:,} images of it"
    rows = "\n".join(f"| {_METRICS.get(key, key)} | {value:.6g} |" for key, value in metrics.items())
    return f"{origin}{part}.\n\n| metric | value |\n|---|---:|\n{rows}"


def _licence(source: Source) -> str:
    if source.licence is None:
        return "None has been chosen for these weights: ask whoever trained them."
    text = f"Weights: {source.licence}."
    if source.dataset == "imagenet":
        text += (
            " They were trained on ImageNet, whose terms of access allow non-commercial use of the images; "
            "whether that concerns you is for you to check."
        )
    return text
