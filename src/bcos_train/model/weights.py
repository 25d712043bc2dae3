"""Weights in and out of files, without running what is in them.

Of the optional packages only safetensors is needed, and only for files of that kind.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train import checkpoint as files
from bcos_train.suggest import suggest

__all__ = ["EMA_WEIGHTS", "WEIGHTS", "described_model", "load_weights", "read_weights", "save_weights"]

#: Names of the weights in a run folder or in an exported folder.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state as safetensors."""
    from safetensors.torch import save

    # Weights in channels_last are stored in the order that every reader expects.
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save(state))  # safetensors' own writer makes files that nobody else may read
    temporary.replace(path)


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """A state dict from a checkpoint of ours, a ``.safetensors`` file, a ``.pth`` state dict or a folder.

    Args:
        path: The file, or a folder that holds ``model.safetensors``, as finished runs and exports do. A checkpoint of
            ours is verified.
        use_ema: Whether to take the averaged weights; ``None``: if the checkpoint or the folder has them.

    Returns:
        The state dict, and whether it is that of the average. The tensors may be read from the file when they are
        used, so that loading them into a model needs no second copy in memory.

    Raises:
        ValueError: The file is missing, damaged or something else, or has no averaged weights.
    """
    is_ema = False
    if path.is_dir():
        is_ema = (path / EMA_WEIGHTS).is_file() if use_ema is None else use_ema
        folder, path = path, path / (EMA_WEIGHTS if is_ema else WEIGHTS)
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}")
    elif not path.is_file():
        raise ValueError(f"weights={path}: no such file")
    elif path.suffix == files.SUFFIX:
        return _read_checkpoint(path, use_ema)
    elif use_ema:
        raise ValueError(f"{path} holds no averaged weights: use_ema=false")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_state_dict(path), is_ema


def described_model(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the model whose weights a folder holds, where an export or a run has written them down.

    Options such as B change no tensor's shape: without them the weights would fit another function.

    Raises:
        ValueError: The description can't be read.
    """
    export, run = folder / "config.json", folder / "config.yaml"
    try:
        if export.is_file():
            config = json.loads(export.read_text(encoding="utf-8"))
            if config.get("library_name") != "bcos-train":
                return None
            return config["model_name"], {**config["model_args"], "num_classes": config["num_classes"]}
        if run.is_file():
            import yaml

            node = dict(yaml.safe_load(run.read_text(encoding="utf-8"))["model"])
            keys = ("_target_", "_partial_", "name", "pretrained", "weights", "backend")
            return node["name"], {key: value for key, value in node.items() if key not in keys}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its config doesn't describe a model ({error!r})") from error
    return None


def _read_checkpoint(path: Path, use_ema: bool | None) -> tuple[dict[str, Tensor], bool]:
    content = files.load(path)
    if "model" not in content:
        raise ValueError(f"{path} holds no model")
    if use_ema is None:
        use_ema = "model_ema" in content
    if use_ema and "model_ema" not in content:
        raise ValueError(f"{path} holds no averaged weights: use_ema=false")
    return content["model_ema" if use_ema else "model"], use_ema


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        # Before version 1.6 torch wrote no zip files, and only those can be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path} is no state dict of tensors: {' '.join(str(error).split())[:200]}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict of tensors")
    return state


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], origin: str, *, new_classifier: bool = False
) -> list[str]:
    """Copy a state dict into a model.

    Args:
        model: Its keys and shapes must be those of ``state``.
        state: The weights.
        origin: Where they are from, for the message.
        new_classifier: Whether the model may have another number of classes. The tensors of its classifier that
            depend on it then stay as they are.

    Returns:
        The keys that were not loaded.

    Raises:
        ValueError: Keys or shapes differ; the message names the first of each kind.
    """
    own = model.state_dict()
    of_classes = _of_other_classes(model, own, state)
    left = of_classes if new_classifier else []
    problems = [f"{key} is missing" for key in own if key not in state][:1]
    problems += [f"{key} is unknown{suggest(key, own)}" for key in state if key not in own][:1]
    problems += [
        f"{key} has the shape {tuple(state[key].shape)}, the model {tuple(own[key].shape)}"
        + (": another number of classes" if key in of_classes else "")
        for key in own
        if key in state and key not in left and state[key].shape != own[key].shape
    ][:1]
    if problems:
        raise ValueError(f"{origin} doesn't fit the model: {'; '.join(problems)}")
    model.load_state_dict({key: state[key] for key in own if key not in left}, strict=not left)
    return left


def _of_other_classes(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the classifier's tensors that have another length in ``state``, along their first axis alone."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    prefix = next((f"{name}." for name, module in model.named_modules() if module is classifier), None)
    return [
        key
        for key in own
        if prefix is not None
        and key.startswith(prefix)
        and key in state
        and own[key].shape != state[key].shape
        and own[key].ndim == state[key].ndim
        and own[key].shape[1:] == state[key].shape[1:]
    ]
