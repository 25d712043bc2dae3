"""Export a model as an ONNX file, checked against the model.

The packages onnx, onnxscript and onnxruntime are needed for this alone.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from bcos_train.nn import LogitLayer
from bcos_train.utils.suggestions import join_words

__all__ = ["INPUT", "OUTPUT", "check_onnx_packages", "onnx_bytes"]

#: Names of the input and the output of the ONNX model.
INPUT, OUTPUT = "images", "logits"
#: Largest error of the logits, relative to the largest logit less the logit bias; or, in deep networks, relative to the
#: error that the model itself has in float32: a ResNet-50's is 3e-5 of its logits.
TOLERANCE, TOLERANCE_OF_ROUNDING = 1e-5, 4


def check_onnx_packages() -> None:
    """Raise a ValueError if a package is missing."""
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(f"writing .onnx needs {join_words(missing, 'and')}: pip install {' '.join(missing)}")


def onnx_bytes(model: nn.Module, in_chans: int, size: int, metadata: Mapping[str, str]) -> bytes:
    """Export a model as ONNX: ``images`` (N, C, S, S) float32, for any N, to ``logits`` (N, K).

    The exported model is run by onnxruntime, on another batch size, and both are compared with the model in float64.

    Args:
        model: (N, C, H, W) -> (N, K), on the CPU. It is switched to evaluation mode.
        in_chans: C.
        size: S, side of the images in pixels.
        metadata: Properties of the ONNX model.

    Raises:
        ValueError: A package is missing; the model can't be exported; its logits are the logit bias and nothing else,
            so that nothing can be compared; or the exported model's are wrong by more than 1e-5 of the largest and by
            more than 4 times the model's own rounding errors.
    """
    check_onnx_packages()
    model = model.eval().requires_grad_(False)
    images = _images(4, in_chans, size)
    expected = _logits(model, images)
    _check_signal(model, expected)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (images[:2],),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
    except Exception as error:  # torch's own messages are pages long
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch can't export this model as ONNX: {type(error).__name__}: {first}") from error
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    exact = _logits(copy.deepcopy(model).double(), images.double())
    _check_equal(model, exact, expected, _run(content, images))
    return content


def _images(n: int, in_chans: int, size: int) -> Tensor:
    """Random images, encoded as [x, 1 - x] where the channels allow."""
    generator = torch.Generator().manual_seed(0)
    if in_chans % 2:
        return torch.rand(n, in_chans, size, size, generator=generator)
    x = torch.rand(n, in_chans // 2, size, size, generator=generator)
    return torch.cat([x, 1 - x], dim=1)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return model(images)
    except (RuntimeError, ValueError) as error:  # such as a size that a ViT doesn't take
        raise ValueError(f"the model can't take images {tuple(images.shape)}: {error}") from error


def _run(content: bytes, images: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _bias(model: nn.Module) -> float:
    return next((m.logit_bias or 0.0 for m in model.modules() if isinstance(m, LogitLayer)), 0.0)


def _signal(model: nn.Module, logits: Tensor) -> float:
    """Largest logit less the logit bias, which would hide any difference."""
    return (logits.double() - _bias(model)).abs().max().item()


def _rounding(model: nn.Module) -> float:
    """Largest rounding of logits by the addition of the bias, in both models."""
    return 2 * torch.finfo(torch.float32).eps * abs(_bias(model))


def _check_signal(model: nn.Module, logits: Tensor) -> None:
    if not (signal := _signal(model, logits)) > 1000 * _rounding(model):
        raise ValueError(
            f"can't check the export: all logits equal the logit bias, {_bias(model):.4g}, to within {signal:.1g}; "
            "has this network been trained?"
        )


def _check_equal(model: nn.Module, exact: Tensor, expected: Tensor, exported: Tensor) -> None:
    own, error = ((logits.double() - exact).abs().max().item() for logits in (expected, exported))
    signal = _signal(model, exact)
    if not error <= max(TOLERANCE * signal + _rounding(model), TOLERANCE_OF_ROUNDING * own):
        raise ValueError(
            f"the ONNX model's logits are wrong by {error:.1g}, of a magnitude of {signal:.1g} "
            f"(the model's own rounding: {own:.1g}); nothing is written"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's progress report and its warnings about itself off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
