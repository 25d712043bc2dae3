"""Export weights as official-style ``.pth``, as ``.safetensors``, as ONNX, or as a folder for the Hugging Face Hub.

The contract:

* Weights are checked against the model, keys and shapes, before anything is written.
* What was written is read back and compared, and only then gets its name: a failure leaves nothing behind. Of an ONNX
  model the outputs are compared, before it is written.
* Nothing is overwritten unless requested, and a run folder never.
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

import torch
from torch import Tensor, nn

from bcos_train.explanation import is_explainable
from bcos_train.model.preprocessing import Preprocessing
from bcos_train.runs.layout import (
    CARD,
    CHECKPOINT_SUFFIX,
    EMA_WEIGHTS,
    EXPORT_CONFIG,
    RUN_CONFIG,
    WEIGHTS,
    WEIGHTS_SUFFIX,
)
from bcos_train.utils.atomic import temporary_path
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.weights.build import build_from_source, warn_of_assumed_bias, with_num_classes
from bcos_train.weights.files import read_weights, to_safetensors
from bcos_train.weights.model_card import export_config, model_card
from bcos_train.weights.model_options import build_model, check_options, known_options
from bcos_train.weights.onnx_file import check_onnx_packages, onnx_bytes
from bcos_train.weights.source import WeightsSource, read_weights_source
from bcos_train.weights.state_dict import load_weights, match_keys

__all__ = ["Exported", "export"]

_ONNX = ".onnx"
_FILE_SUFFIXES = (".pth", WEIGHTS_SUFFIX, _ONNX)
#: Suffixes of other file formats, which are no valid names of folders.
_REJECTED = (CHECKPOINT_SUFFIX, ".pt", ".bin", ".pkl", ".h5", ".tar", ".zip", ".gz", ".json", ".safetensor")


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Args:
        path: The file or folder.
        source: The weights, with the model's name and all its options.
        sha256: Digest of the weights file.
    """

    path: Path
    source: WeightsSource
    sha256: str


def export(
    source: str,
    target: Path,
    *,
    model: str | None = None,
    options: Mapping[str, object] | None = None,
    use_ema: bool | None = None,
    with_hash: bool = False,
    force: bool = False,
    license: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> Exported:
    """Export weights.

    Args:
        source: As for :func:`bcos_train.weights.read_weights_source`.
        target: ``*.pth``: a state dict as in the official release. ``*.safetensors``: the same in that format.
            ``*.onnx``: the model itself, for images of one size; see :func:`bcos_train.weights.onnx_file.onnx_bytes`.
            Any other name: a folder with ``model.safetensors``, ``config.json`` and a model card, ``README.md``.
        model: Model name, ``timm:<name>`` for one of timm's; ``None``: that of the source.
        options: Model options that the source doesn't specify. The number of classes is read off the weights.
        use_ema: True for the averaged weights, False for the plain ones; ``None``: averaged if there are any.
        with_hash: Append the first ten digits of the file's SHA-256 to its name, as in the official release.
        force: Overwrite existing files; in a folder, the three files.
        license: License of the weights, as an identifier of the Hugging Face Hub; ``None``: that of the source, if any.
        class_names: In the order of the outputs; ``None``: those of the source or of a known data set.
        image_size: Side in pixels of an ONNX model's images; ``None``: that of the inference transform.

    Raises:
        ValueError: The source can't be read, its weights don't fit the model, the target exists or can't be written, or
            the license is not an identifier; for ONNX also if the image size is unknown, and as for
            :func:`bcos_train.weights.onnx_file.onnx_bytes`.
    """
    is_file = _check_target(target, with_hash)
    if image_size is not None and target.suffix != _ONNX:
        raise ValueError(f"--image-size is for a target that ends in {_ONNX}, not for {target}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size={image_size}: at least 1")
    if target.suffix == _ONNX:
        check_onnx_packages()
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(
            f"license {license!r}: must be an identifier of the Hugging Face Hub, such as apache-2.0, mit or other"
        )
    if not with_hash:
        _check_free(target, force)
    weights, network = _validate(read_weights_source(source, use_ema).for_model(model, options or {}))
    weights = replace(weights, license=license or weights.license, class_names=_class_names(weights, class_names))
    if is_file:
        content = _file_bytes(target.suffix, weights, network, image_size)
        digest = hashlib.sha256(content).hexdigest()
        if with_hash:
            target = target.with_name(f"{target.stem}-{digest[:10]}{target.suffix}")
        _check_free(target, force)
        files = {target.name: content}
    else:
        assert weights.model_name is not None
        warn_of_assumed_bias(network, weights, weights.model_name, weights.options)
        content = to_safetensors(weights.state, weights.class_names)
        digest = hashlib.sha256(content).hexdigest()
        files = {WEIGHTS: content, **_description_files(weights, network, digest)}
    with _stage_files(target, files) as stage:
        written = stage / target.name if is_file else stage
        if target.suffix != _ONNX:  # was checked, and holds no state dict
            _verify_written(written, weights.state)
        _publish(stage, target, is_file, list(files))
    return Exported(target, weights, digest)


# ---- check of the source


def _validate(source: WeightsSource) -> tuple[WeightsSource, nn.Module]:
    """Check that the weights fit their model.

    Returns:
        The source with its tensors in the model's order and all options, and the model on the meta device.

    Raises:
        ValueError: The model is unknown, or the weights don't fit it.
    """
    if source.model_name is None:
        raise ValueError(f"{source.origin} doesn't specify its model: set --model NAME")
    check_options(source.model_name, source.options)
    name, source = source.model_name, with_num_classes(source)
    # Shapes suffice, and the largest models take gigabytes.
    with torch.device("meta"):
        network = build_model(name, source.options)
    weights = match_keys(network.state_dict(), source.state, source.origin)
    shapes = {key: torch.empty_like(value, device="meta") for key, value in weights.items()}
    load_weights(network, shapes, source.origin)
    state = {key: _contiguous_copy(weights[key]) for key in network.state_dict()}
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{source.origin}: {key} holds values that are not finite")
    options = _with_defaults(source.options, known_options(name))
    return replace(source, state=state, options=options), network


def _with_defaults(options: Mapping[str, object], known: Mapping[str, object]) -> dict[str, object]:
    """Add the defaults, so that the exported folder stays valid if they ever change."""
    return {
        key: options.get(key, default)
        for key, default in known.items()
        if key in options or isinstance(default, (str, int, float))
    }


def _contiguous_copy(value: Tensor) -> Tensor:
    """Copy to the CPU, contiguous and with its own storage: ``torch.save`` would write a view's whole storage."""
    return value.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _class_names(source: WeightsSource, class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    n = source.options["num_classes"]
    if class_names is not None and len(class_names) != n:
        raise ValueError(f"{len(class_names)} class names, but the model has {n} classes")
    names = source.class_names_or_usual if class_names is None else tuple(class_names)
    return names if names is not None and len(names) == n else None


# ---- target


def _check_target(target: Path, with_hash: bool) -> bool:
    """True if the target is a file.

    Raises:
        ValueError: The suffix is neither a file's nor a folder's, or a folder can't have the hash in its name.
    """
    is_file = target.suffix in _FILE_SUFFIXES
    if not is_file and target.suffix in _REJECTED:
        near = suggest(target.suffix, _FILE_SUFFIXES)
        raise ValueError(
            f"{target}: a target is a .pth, .safetensors or .onnx file or a folder, not {target.suffix}{near}"
        )
    if with_hash and not is_file:
        raise ValueError(f"--hash needs a file, and {target} would be a folder; its {EXPORT_CONFIG} holds the SHA-256")
    return is_file


def _check_free(target: Path, force: bool) -> None:
    """Raise a ValueError if writing to the target would overwrite something that may not be overwritten."""
    if target.suffix in _FILE_SUFFIXES:
        if target.is_dir():
            raise ValueError(f"{target} is a folder")
        is_described = any((target.parent / name).exists() for name in (RUN_CONFIG, EXPORT_CONFIG))
        if is_described and target.name in (WEIGHTS, EMA_WEIGHTS):
            raise ValueError(f"{target} belongs to its run or exported folder: choose another place")
        if target.exists() and not force:
            raise ValueError(f"{target} exists: choose another name, or use --force to overwrite it")
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a target is a .pth, .safetensors or .onnx file or a folder")
    if any((target / name).exists() for name in (RUN_CONFIG, EMA_WEIGHTS)):
        raise ValueError(f"{target} is a run folder, and nothing is exported into those: choose another place")
    if target.exists() and any(target.iterdir()) and not force:
        raise ValueError(f"{target} exists and isn't empty: choose another name, or use --force to overwrite its files")


def _file_bytes(suffix: str, source: WeightsSource, network: nn.Module, image_size: int | None) -> bytes:
    if suffix == _ONNX:
        return _onnx_bytes(source, network, image_size)
    return _pth_bytes(source.state) if suffix == ".pth" else to_safetensors(source.state, source.class_names)


def _onnx_bytes(source: WeightsSource, network: nn.Module, image_size: int | None) -> bytes:
    """Return the model as ONNX, with what ``config.json`` would say as the property ``config``."""
    preprocessing = _preprocessing(source, network)
    if image_size is None and preprocessing is not None:
        image_size = preprocessing.image_size
    if image_size is None:
        raise ValueError("the inference transform fixes no image size: set --image-size PIXELS, the side of the images")
    config = {**export_config(source, preprocessing, _in_chans(network), "")}
    del config["sha256"]  # of a weights file, which this is not
    return onnx_bytes(build_from_source(source), _in_chans(network), image_size, {"config": json.dumps(config)})


def _pth_bytes(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _description_files(source: WeightsSource, network: nn.Module, digest: str) -> dict[str, bytes]:
    """Return the contents of ``config.json`` and the model card by file name."""
    preprocessing = _preprocessing(source, network)
    n_params = sum(parameter.numel() for parameter in network.parameters())
    config = export_config(source, preprocessing, _in_chans(network), digest)
    card = model_card(source, preprocessing, n_params, is_explainable(network))
    return {EXPORT_CONFIG: (json.dumps(config, indent=2) + "\n").encode(), CARD: card.encode()}


def _preprocessing(source: WeightsSource, network: nn.Module) -> Preprocessing | None:
    return source.preprocessing or Preprocessing.from_transform(getattr(network, "transform", None))


def _in_chans(network: nn.Module) -> int:
    return int(getattr(network, "in_chans", 3))


@contextlib.contextmanager
def _stage_files(target: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write the files to a temporary folder beside the target.

    The folder is removed at the end; after a failure, so are the parent folders that were created for it.
    """
    target = target.absolute()
    created = [folder for folder in target.parents if not folder.exists()]
    stage = temporary_path(target)
    try:
        stage.mkdir(parents=True)
        for name, content in files.items():
            with (stage / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        yield stage
        created = []
    except OSError as error:
        raise ValueError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _verify_written(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless reading the weights back returns the same tensors."""
    written, _ = read_weights(path, use_ema=False)
    differing = [
        key
        for key in {**state, **written}
        if key not in written
        or key not in state
        or written[key].dtype != state[key].dtype
        or not torch.equal(written[key], state[key])
    ]
    if differing:
        raise ValueError(f"{path.name} differs after reading it back: {join_words(differing)}")


def _publish(stage: Path, target: Path, is_file: bool, names: Sequence[str]) -> None:
    if not is_file and not target.exists():
        os.replace(stage, target)
        return
    # Other files in the folder stay, such as the Hub's .git.
    for name in names:
        os.replace(stage / name, target if is_file else target / name)
