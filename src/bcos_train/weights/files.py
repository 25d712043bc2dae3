"""Read and write weights files without executing anything stored in them.

The optional package safetensors is needed for ``.safetensors`` files only.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bcos_train.runs import checkpoint as checkpoints
from bcos_train.runs.checkpoint import digest_path
from bcos_train.runs.layout import CHECKPOINT_SUFFIX, EMA_WEIGHTS, WEIGHTS, WEIGHTS_SUFFIX
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.substitutes import substitute_reason
from bcos_train.weights.third_party import read_third_party, split_average

__all__ = [
    "WeightsFile",
    "read_file",
    "read_json",
    "read_weights",
    "save_weights",
    "to_safetensors",
]

#: Entry for the class names in the metadata of a safetensors file and in a checkpoint.
_CLASS_NAMES = "class_names"


@dataclass(frozen=True)
class WeightsFile:
    """Content of a weights file.

    Args:
        state: The state dict as it was saved: its keys may begin with a prefix that
            :func:`bcos_train.weights.state_dict.match_keys` removes. Tensors may be memory-mapped, so that loading them
            into a model needs no second copy.
        is_ema: True if these are the averaged weights.
        class_names: Recorded in the file, in the order of the outputs; ``None``: not recorded.
        hyper_parameters: Those of a Lightning checkpoint, otherwise ``None``.
    """

    state: dict[str, Tensor]
    is_ema: bool
    class_names: tuple[str, ...] | None = None
    hyper_parameters: dict[str, object] | None = None


def save_weights(model: nn.Module, path: Path, class_names: Sequence[str] | None = None) -> None:
    """Save the model's state dict as safetensors.

    Args:
        class_names: In the order of the outputs, recorded in the file; ``None``: unknown.
    """
    # Weights in channels_last are stored in the memory order that every reader expects.
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        # safetensors' own writer creates files that only their owner can read.
        temporary.write_bytes(to_safetensors(state, class_names))


def to_safetensors(state: Mapping[str, Tensor], class_names: Sequence[str] | None = None) -> bytes:
    """Return the content of a safetensors file; class names are JSON in its metadata.

    Raises:
        ValueError: The package safetensors is missing.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ValueError("writing .safetensors needs the package safetensors: pip install safetensors") from error
    metadata = {"format": "pt"}
    if class_names is not None:
        metadata[_CLASS_NAMES] = json.dumps(list(class_names))
    return _with_sorted_metadata(save(dict(state), metadata=metadata))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sort the metadata in the header of a safetensors file: safetensors' order is random, and so would be the digest.

    The file begins with the length of the header, 8 bytes; the header is JSON, padded with spaces to 8 bytes.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """Read the state dict of :func:`read_file`, and True if it holds the averaged weights."""
    file = read_file(path, use_ema)
    return file.state, file.is_ema


def read_file(path: Path, use_ema: bool | None = None) -> WeightsFile:
    """Read weights from a file, or from a folder with ``model.safetensors`` (a finished run or an export).

    Args:
        path: A ``.safetensors`` file; one of our checkpoints, which is verified; a file that another program saved with
            torch (:mod:`bcos_train.weights.third_party`); or a folder. Nothing in the file is executed.
        use_ema: True for the averaged weights, False for the plain ones; ``None``: averaged if there are any.

    Raises:
        ValueError: The file is missing, damaged or not a weights file, or lacks the requested weights.

    Warns:
        UserWarning: A file of another program holds both, and the averaged ones are used by default.
    """
    if path.is_dir():
        is_ema = (path / EMA_WEIGHTS).is_file() if use_ema is None else use_ema
        file = path / (EMA_WEIGHTS if is_ema else WEIGHTS)
        if not file.is_file():
            if (path / WEIGHTS).is_file():
                raise ValueError(f"{path} holds no averaged weights, only the plain ones in {WEIGHTS}")
            raise ValueError(f"{path} holds no {file.name}")
        state, class_names = _read_safetensors(file)
        return WeightsFile(state, is_ema, class_names)
    if not path.is_file():
        raise ValueError(f"weights={path}: no such file")
    class_names, hyper_parameters, is_own = None, None, False
    if path.suffix == WEIGHTS_SUFFIX:
        state, class_names = _read_safetensors(path)
        states = split_average(state)
    elif path.suffix == CHECKPOINT_SUFFIX and digest_path(path).is_file():
        content, is_own = checkpoints.load(path), True
        if "model" not in content:
            raise ValueError(f"{path} holds no model")
        states = content["model"], content.get("model_ema", {})
        class_names = _as_class_names(content.get(_CLASS_NAMES))
    else:
        _check_no_substitute(path)
        states, hyper_parameters = read_third_party(path)
    is_ema = bool(states[1]) if use_ema is None else use_ema
    if not states[is_ema] and states[not is_ema]:
        kinds = ("plain", "averaged")
        raise ValueError(f"{path} holds no {kinds[is_ema]} weights, only the {kinds[not is_ema]} ones")
    if use_ema is None and all(states) and not is_own:
        warnings.warn(
            f"{path} holds plain and averaged weights: the averaged ones are used (use_ema=false for the others; where "
            "there is no use_ema, save the others alone)",
            stacklevel=2,
        )
    return WeightsFile(states[is_ema], is_ema, class_names, hyper_parameters)


def _check_no_substitute(path: Path) -> None:
    """Raise a ValueError for a Git LFS pointer, a web page or an empty file."""
    try:
        reason = substitute_reason(path)
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror or error}") from error
    if reason is not None:
        raise ValueError(f"{path} {reason}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Read the state dict and the recorded class names, if any."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    _check_no_substitute(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        return state, _as_class_names(json.loads(metadata.get(_CLASS_NAMES, "null")))
    except (ValueError, RecursionError):  # an entry of another program
        return state, None


def _as_class_names(value: object) -> tuple[str, ...] | None:
    """Return class names as read from a file; ``None`` if it is anything else."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: The file can't be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content
