"""Weights in and out of files, without running what is in them."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bcos_train.suggest import suggest
from bcos_train.training import checkpoint as files

WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's state as safetensors."""
    # Weights in channels_last are stored in the order that every reader expects.
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save(state))  # safetensors' own writer makes files that nobody else may read
    temporary.replace(path)


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """A state dict from a checkpoint of ours, a ``.safetensors`` file or a ``.pth`` state dict.

    Args:
        path: The file. A checkpoint of ours is verified.
        use_ema: Whether to take the averaged weights; ``None``: if the checkpoint has them.

    Returns:
        The state dict, and whether it is that of the average.

    Raises:
        ValueError: The file is damaged or something else, or has no averaged weights.
    """
    if not path.is_file():
        raise ValueError(f"weights={path}: no such file")
    if path.suffix == ".safetensors":
        _refuse_ema(use_ema, path)
        try:
            return load_file(path), False
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    if path.suffix == files.SUFFIX:
        content = files.load(path)
        if "model" not in content:
            raise ValueError(f"{path} holds no model")
        if use_ema is None:
            use_ema = "model_ema" in content
        if use_ema and "model_ema" not in content:
            _refuse_ema(use_ema, path)
        return content["model_ema" if use_ema else "model"], use_ema
    _refuse_ema(use_ema, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no state dict of tensors: {' '.join(str(error).split())[:200]}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict of tensors")
    return state, False


def _refuse_ema(use_ema: bool | None, path: Path) -> None:
    if use_ema:
        raise ValueError(f"{path} holds no averaged weights: use_ema=false")


def load_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load strictly.

    Raises:
        ValueError: Keys or shapes differ; the message names the first of each kind.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state][:1]
    problems += [f"{key} is unknown{suggest(key, own)}" for key in state if key not in own][:1]
    problems += [
        f"{key} has the shape {tuple(state[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ][:1]
    if problems:
        raise ValueError(f"{origin} doesn't fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)
