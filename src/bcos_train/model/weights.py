"""Weights in and out of files, without running what is in them.

Of the optional packages only safetensors is needed, and only for files of that kind.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train import checkpoint as files
from bcos_train.checkpoint import file_sha256
from bcos_train.replacing import replacing
from bcos_train.suggest import suggest

__all__ = [
    "EMA_WEIGHTS",
    "WEIGHTS",
    "count_classes",
    "file_sha256",
    "load_weights",
    "read_file",
    "read_weights",
    "save_weights",
]

#: Names of the weights in a run folder or in an exported folder.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"
#: Where the official training code's checkpoints have the model and its average.
_PREFIXES = ("model.", "ema.module.")


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state as safetensors."""
    from safetensors.torch import save

    # Weights in channels_last are stored in the order that every reader expects.
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(state))  # safetensors' own writer makes files that nobody else may read


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """A state dict from a file, or from a folder that holds ``model.safetensors``, as finished runs and exports do.

    Args:
        path: The file, as for :func:`read_file`, or the folder.
        use_ema: Whether to take the averaged weights; ``None``: if the file or the folder has them.

    Returns:
        The state dict, and whether it is that of the average. The tensors may be read from the file when they are
        used, so that loading them into a model needs no second copy in memory.

    Raises:
        ValueError: The file is missing, damaged or something else, or has no averaged weights.
    """
    if not path.is_dir():
        return read_file(path, use_ema)[:2]
    is_ema = (path / EMA_WEIGHTS).is_file() if use_ema is None else use_ema
    file = path / (EMA_WEIGHTS if is_ema else WEIGHTS)
    if not file.is_file():
        if (path / WEIGHTS).is_file():
            raise ValueError(f"{path} holds no averaged weights, only the plain ones in {WEIGHTS}")
        raise ValueError(f"{path} holds no {file.name}")
    return _read_safetensors(file), is_ema


def read_file(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Tensor], bool, dict[str, Any] | None]:
    """A state dict from a file.

    Args:
        path: A ``.safetensors`` file; a checkpoint of ours, which is verified; one of the official training code; or
            any other file that torch has saved a state dict to. Nothing that it holds is run.
        use_ema: As for :func:`read_weights`.

    Returns:
        As :func:`read_weights`, and the hyperparameters in a checkpoint of the official training code, else ``None``.
    """
    if not path.is_file():
        raise ValueError(f"weights={path}: no such file")
    trained = None
    if path.suffix == ".safetensors":
        states = [_read_safetensors(path), {}]
    elif path.suffix == files.SUFFIX and path.with_name(f"{path.name}.sha256").is_file():
        content = files.load(path)
        if "model" not in content:
            raise ValueError(f"{path} holds no model")
        states = [content["model"], content.get("model_ema", {})]
    else:
        states, trained = _read_foreign(path)
    is_ema = bool(states[1]) if use_ema is None else use_ema
    if is_ema and not states[1]:
        raise ValueError(f"{path} holds no averaged weights, only the plain ones")
    return states[is_ema], is_ema, trained


def _read_foreign(path: Path) -> tuple[list[dict[str, Tensor]], dict[str, Any] | None]:
    """What another program has saved: the plain and the averaged weights, and the official hyperparameters."""
    content = _load(path)
    content = content if isinstance(content, dict) else {}
    state, trained = content.get("state_dict", content), None
    states = [state, {}]
    if "state_dict" in content and "pytorch-lightning_version" in content:
        trained = content.get("hyper_parameters")
        trained = trained if isinstance(trained, dict) else {}
        states = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in _PREFIXES]
    elif path.suffix == files.SUFFIX:
        files.verify(path)  # says what is missing
    if not states[0] or not all(isinstance(value, Tensor) for state in states for value in state.values()):
        what = "state dict of tensors" if trained is None else "checkpoint of the official training code"
        raise ValueError(f"{path} is no {what}")
    return states, trained


def _load(path: Path) -> Any:
    """What torch has saved, read without running anything."""
    try:
        # Before version 1.6 torch wrote no zip files, and only those can be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds a Python object ({found[1]}), and reading that could run code; where you trust the "
                "file, save its state_dict alone with the program that wrote it"
            ) from error
        # torch's own text advises to run what is in the file.
        raise ValueError(f"{path} is no file of weights, or only a part of one") from error


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


def count_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """The number of classes of weights, read off the classifier; with MaxOut that has several rows for each.

    Args:
        model: As the weights', with any number of classes.
        state: The weights.
    """
    own, classes = model.state_dict(), int(model.num_classes)  # type: ignore[arg-type]
    for key in _of_other_classes(model, own, state):
        n, rest = divmod(len(state[key]) * classes, len(own[key]))
        if n and not rest:
            return n
    return classes
