"""Weights for others: official-style ``.pth``, ``.safetensors``, and folders as the Hugging Face Hub has them.

The contract:

* Weights are checked against the model, keys and shapes, before anything is written.
* What is written is read again and compared, and gets its name only then: a failure leaves nothing behind.
* Nothing is overwritten unless that is asked for, and a run folder never.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.model import BcosModel, create_model, timm_model
from bcos_train.model.preprocessing import Preprocessing
from bcos_train.model.source import CONFIG, RUN_CONFIG, TIMM, describe
from bcos_train.model.source import read_source as read_described
from bcos_train.model.weights import EMA_WEIGHTS, WEIGHTS, count_classes, load_weights, read_weights
from bcos_train.suggest import join_words, suggest
from bcos_train.weights.export_source import Source, described_by, known_options, read_source
from bcos_train.weights.model_card import export_config, model_card

__all__ = ["Exported", "export", "load_exported"]

CARD = "README.md"
#: Endings of files that other programs write, and that no folder should have.
_OTHER_SUFFIXES = (".pt", ".ckpt", ".bin", ".pkl", ".onnx", ".h5", ".tar", ".zip", ".gz", ".json", ".safetensor")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file or folder.
        source: The weights, with the model's name and all its options.
        sha256: Of the file of weights.
    """

    path: Path
    source: Source
    sha256: str


def export(
    source: str,
    target: Path,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    with_hash: bool = False,
    force: bool = False,
    licence: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Exported:
    """Hand on weights in a form that others read.

    Args:
        source: A run folder; a checkpoint or file of weights; an official training checkpoint; an exported folder; or
            ``official:<row>``.
        target: ``*.pth``: a state dict as in the official release. ``*.safetensors``: the same in that format. Anything
            else: a folder with ``model.safetensors``, ``config.json`` and a model card, ``README.md``.
        model: Its name; ``None``: as the source says. Before the name of one of timm's stands ``timm:``.
        options: The model's options that the source doesn't say. The number of classes is that of the weights.
        use_ema: Whether to take the averaged weights; ``None``: if there are any.
        with_hash: Put the first ten digits of the file's SHA-256 into its name, as the official ones have them.
        force: Overwrite what is there; in a folder, the three files.
        licence: Of the weights, as the Hugging Face Hub calls it; ``None``: as the source says, else none.
        class_names: In the order of the outputs; ``None``: as the source says, or the data set's where it is known.

    Raises:
        ValueError: A source that can't be read, weights that don't fit the model, a target that is there already or
            can't be written, a licence that is no word.
    """
    is_file = _check_target(target, with_hash)
    if licence is not None and not re.fullmatch(r"[\w.+-]+", licence):
        raise ValueError(
            f"licence {licence!r}: give it as the Hugging Face Hub calls it, such as apache-2.0, mit or other"
        )
    if not with_hash:
        _check_free(target, force)
    found = described_by(read_source(source, use_ema), model, options or {})
    found, network = _checked(found)
    found = replace(found, licence=licence or found.licence, class_names=_names_of(found, class_names))
    if is_file:
        content = _pth(found.state) if target.suffix == ".pth" else _safetensors(found.state)
        digest = hashlib.sha256(content).hexdigest()
        if with_hash:
            target = target.with_name(f"{target.stem}-{digest[:10]}{target.suffix}")
        _check_free(target, force)
        files = {target.name: content}
    else:
        content = _safetensors(found.state)
        digest = hashlib.sha256(content).hexdigest()
        files = {WEIGHTS: content, **_described(found, network, digest)}
    with _staged(target, files) as stage:
        written = stage / target.name if is_file else stage
        _compare(written, found.state)
        _publish(stage, target, is_file, list(files))
    return Exported(target, found, digest)


def load_exported(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of an exported folder: its options, its weights, its transform.

    Raises:
        ValueError: No such folder, or its weights aren't those that its ``config.json`` describes.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{folder} is no exported folder: it holds no {CONFIG}")
    if not describe(path).is_export:
        raise ValueError(f"{path / CONFIG} is no config of an exported folder")
    found = read_described(path)
    assert found.name is not None
    model = _build(found.name, found.options)
    load_weights(model, found.state, str(path))
    if found.preprocessing is not None:
        model.transform = found.preprocessing.transform()  # type: ignore[assignment]
    return model


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        if name.startswith(TIMM):
            return timm_model(name.removeprefix(TIMM), **options)
        return create_model(name, **options)
    except TypeError as error:
        known = known_options(name)
        wrong = {key: value for key, value in options.items() if _is_number(known.get(key)) and not _is_number(value)}
        given = ", ".join(f"{key}={value}" for key, value in (wrong or options).items())
        why = f"{join_words(wrong, 'and')}: a number is wanted" if wrong else " ".join(str(error).split())
        raise ValueError(f"{name} can't be built with {given} ({why})") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


# ---- the check


def _checked(source: Source) -> tuple[Source, nn.Module]:
    """The source with its weights in the model's order and all of its options; and the model without its memory.

    Raises:
        ValueError: The model isn't known, or the weights don't fit it.
    """
    if source.name is None:
        raise ValueError(f"{source.origin} doesn't say which model it is of: give --model NAME")
    known = known_options(source.name)
    for key in source.options:
        if key not in known:
            raise ValueError(f"{source.name} has no option {key!r}{suggest(key, known)}; options: {', '.join(known)}")
    options = dict(source.options)
    # Only shapes are wanted, and the largest models have gigabytes.
    with torch.device("meta"):
        network = _build(source.name, options)
        if "num_classes" not in options:
            options["num_classes"] = count_classes(network, source.state)
            network = _build(source.name, options)
    hollow = {key: torch.empty_like(value, device="meta") for key, value in source.state.items()}
    load_weights(network, hollow, source.origin)
    state = {key: _plain(source.state[key]) for key in network.state_dict()}
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{source.origin}: {key} holds values that are not finite")
    return replace(source, state=state, options=_written_out(options, known)), network


def _written_out(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults, so that the folder stays right should they ever change."""
    return {
        key: options.get(key, default)
        for key, default in known.items()
        if key in options or isinstance(default, (str, int, float))
    }


def _plain(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and with its own memory: a view would drag the whole of it into the file."""
    return value.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _names_of(source: Source, given: Sequence[str] | None) -> tuple[str, ...] | None:
    n = source.options["num_classes"]
    if given is not None and len(given) != n:
        raise ValueError(f"{len(given)} names of classes, but the model has {n} classes")
    names = source.class_names if given is None else tuple(given)
    return names if names is not None and len(names) == n else None


# ---- the target


def _check_target(target: Path, with_hash: bool) -> bool:
    """Whether the target is a file."""
    is_file = target.suffix in (".pth", ".safetensors")
    if not is_file and target.suffix in _OTHER_SUFFIXES:
        near = suggest(target.suffix, (".pth", ".safetensors"))
        raise ValueError(f"{target}: a target is a .pth or .safetensors file or a folder, not {target.suffix}{near}")
    if with_hash and not is_file:
        raise ValueError(f"--hash goes with a file, and {target} would be a folder; its {CONFIG} has the SHA-256")
    return is_file


def _check_free(target: Path, force: bool) -> None:
    is_file = target.suffix in (".pth", ".safetensors")
    if is_file:
        if target.is_dir():
            raise ValueError(f"{target} is a folder")
        is_described = any((target.parent / name).exists() for name in (RUN_CONFIG, CONFIG))
        if is_described and target.name in (WEIGHTS, EMA_WEIGHTS):
            raise ValueError(f"{target} belongs to the folder that it lies in: choose another place")
        if target.exists() and not force:
            raise ValueError(f"{target} exists: give another name, or --force to overwrite it")
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a target is a .pth or .safetensors file or a folder")
    if any((target / name).exists() for name in (RUN_CONFIG, EMA_WEIGHTS)):
        raise ValueError(f"{target} is a run folder, which is never written into: choose another place")
    if target.exists() and any(target.iterdir()) and not force:
        raise ValueError(f"{target} exists and isn't empty: give another name, or --force to overwrite its files")


def _pth(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _safetensors(state: Mapping[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ValueError("writing .safetensors needs the package safetensors: pip install safetensors") from error
    return save(dict(state), metadata={"format": "pt"})


def _described(source: Source, network: nn.Module, digest: str) -> dict[str, bytes]:
    """``config.json`` and the model card."""
    preprocessing = source.preprocessing or Preprocessing.of(getattr(network, "transform", None))
    in_chans = int(getattr(network, "in_chans", 3))
    n_params = sum(parameter.numel() for parameter in network.parameters())
    config = export_config(source, preprocessing, in_chans, digest)
    card = model_card(source, preprocessing, n_params, can_explain=isinstance(network, BcosModel))
    return {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), CARD: card.encode()}


@contextlib.contextmanager
def _staged(target: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder beside the target that holds the files. It goes in the end, after a failure with the folders above."""
    target = target.absolute()
    made = [folder for folder in target.parents if not folder.exists()]
    stage = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        stage.mkdir(parents=True)
        for name, content in files.items():
            with (stage / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        yield stage
        made = []
    except OSError as error:
        raise ValueError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _compare(path: Path, state: Mapping[str, Tensor]) -> None:
    again, _ = read_weights(path, use_ema=False)
    differing = [
        key
        for key in {**state, **again}
        if key not in again
        or key not in state
        or again[key].dtype != state[key].dtype
        or not torch.equal(again[key], state[key])
    ]
    if differing:
        raise ValueError(f"{path.name} did not come back as it was written: {join_words(differing)}")


def _publish(stage: Path, target: Path, is_file: bool, names: Sequence[str]) -> None:
    if not is_file and not target.exists():
        os.replace(stage, target)
        return
    # What else lies in the folder, such as the hub's .git, stays.
    for name in names:
        os.replace(stage / name, target if is_file else target / name)
