"""Read weights that another program saved with torch.

Recognized are a state dict, a dictionary with state dicts one level below (``model``, ``state_dict``, ``model_ema``, …)
and a Lightning checkpoint. Averaged weights are those of a ``torch.optim.swa_utils.AveragedModel``, or under a name
with the word ``ema``, ``averaged`` or ``swa``. Prefixes of the keys are removed later, by
:func:`bcos_train.weights.state_dict.match_keys`, which knows the model: it also finds the one of several state dicts,
such as ``student`` and ``teacher``, that fits, and refuses a file if several do.

Nothing in a file is executed. Python objects beside the weights, such as hyperparameters, are replaced by placeholders:
their classes are never imported.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcos_train.runs import checkpoint as checkpoints
from bcos_train.runs.layout import CHECKPOINT_SUFFIX
from bcos_train.utils.suggestions import join_words

__all__ = ["read_third_party", "split_average"]

_AVERAGE = re.compile(r"(^|[_-])(ema|averaged?|swa)([_-]|$)")

State = dict[str, Tensor]


class _Placeholder:
    """An object of a class that is not imported; subclasses are named after that class."""

    def __new__(cls, *args: object) -> "_Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_third_party(path: Path) -> tuple[tuple[State, State], dict[str, object] | None]:
    """Read the plain and the averaged weights, either may be empty, and the hyperparameters of a Lightning checkpoint.

    Raises:
        ValueError: The file can't be read, or holds no state dict.
    """
    content = _torch_load(path)
    if path.suffix == CHECKPOINT_SUFFIX and "model" in content:  # one of ours; the error names the missing digest file
        checkpoints.verify(path)
    hyper_parameters = None
    if "pytorch-lightning_version" in content:
        hyper_parameters = content.get("hyper_parameters")
        hyper_parameters = hyper_parameters if isinstance(hyper_parameters, dict) else {}
    return _find_states(content, path), hyper_parameters


def split_average(state: State) -> tuple[State, State]:
    """Separate the averaged weights in a state dict, such as ``ema.module.*`` beside ``model.*``, from the others.

    A module's own buffers may have such names too: averaged weights have the same keys as others.
    """
    if "n_averaged" in state and all(key.startswith("module.") for key in state if key != "n_averaged"):
        return {}, state
    averaged = {key: value for key, value in state.items() if _AVERAGE.search(key.partition(".")[0])}
    plain = {key: value for key, value in state.items() if key not in averaged}
    weights = [key for key, value in averaged.items() if value.ndim]  # without counters of updates
    start = len(_shared_prefix(weights))
    tails = {".".join(parts[i:]) for parts in (key.split(".") for key in plain) for i in range(len(parts))}
    is_copy = bool(weights) and all(key[start:] in tails for key in weights)
    return (plain, averaged) if is_copy else (state, {})


def _shared_prefix(keys: list[str]) -> str:
    """Return the components that all keys begin with, with a dot at the end; the last component is never among them."""
    if not keys:
        return ""
    first, last = (key.split(".")[:-1] for key in (min(keys), max(keys)))
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:n])


def _find_states(content: Mapping[str, Any], path: Path) -> tuple[State, State]:
    """Return the plain and the averaged weights."""
    if _is_state(content):
        return split_average(dict(content))
    states = {name: value for name, value in content.items() if _is_state(value)}
    if "current_model_state" in states and "state_dict" in states:  # of Lightning's WeightAveraging
        return states["current_model_state"], states["state_dict"]
    names = [[name for name in states if bool(_AVERAGE.search(name)) is is_average] for is_average in (False, True)]
    plain, averaged = ({name: states[name] for name in group} for group in names)
    if not plain and not averaged:
        raise ValueError(_no_state(content, path))
    first, second = split_average(_merge(plain)) if plain else ({}, {})
    return first, _merge(averaged) if averaged else second


def _is_state(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _merge(states: Mapping[str, State]) -> State:
    """Return the only state dict, or several as one, with their names as prefixes."""
    if len(states) == 1:
        return next(iter(states.values()))
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _no_state(content: Mapping[str, Any], path: Path) -> str:
    values = [*content.values(), *(v for value in content.values() if isinstance(value, dict) for v in value.values())]
    if objects := [type(value).__name__ for value in values if isinstance(value, _Placeholder)]:
        return _refusal(path, objects[0])
    message = f"{path} is not a state dict of tensors, and holds none one level below"
    return f"{message}; its keys: {join_words(map(str, content), 'and', 6)}" if content else message


def _refusal(path: Path, name: str) -> str:
    return (
        f"{path} holds a Python object ({name}), and reading that could run code; if you trust the file, "
        "save its state_dict alone with the program that wrote it"
    )


def _torch_load(path: Path) -> dict[str, Any]:
    """Load the dictionary in a file; an empty one if the file holds something else."""
    # Before version 1.6 torch wrote no zip files, and only those can be mapped into memory.
    is_zip = zipfile.is_zipfile(path)
    names: list[str] = []
    try:
        if is_zip:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        placeholders: list[Any] = [(type(name, (_Placeholder,), {}), name) for name in names]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror or error}") from error
    except Exception as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(_refusal(path, match[1])) from error
        if "torchscript" in str(error).lower():
            raise ValueError(f"{path} is a TorchScript file: save the state_dict() of its model instead") from error
        if names:  # such as a method, which placeholders can't stand for
            raise ValueError(_refusal(path, join_words(names, "and", 3))) from error
        # torch's own message suggests weights_only=False, which would run whatever the file contains.
        raise ValueError(f"{path} is not a weights file, or only part of one") from error
    if isinstance(content, _Placeholder):
        raise ValueError(_refusal(path, type(content).__name__))
    return content if isinstance(content, dict) else {}
