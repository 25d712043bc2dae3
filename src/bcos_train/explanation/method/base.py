"""What every explanation method is, and what several of them share.

Axes: N images, T targets of each image, C channels of the model's input, H W pixels, K classes, V perturbed variants
of each image.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from bcos_train.explanation.mode import evaluating
from bcos_train.explanation.precision import without_tf32
from bcos_train.nn import cached_weights

__all__ = [
    "CannotExplain",
    "Encode",
    "Method",
    "check_counts",
    "explaining",
    "gradients",
    "library",
    "pairs",
    "perturbable",
    "probabilities",
    "select",
    "token_grid",
]

Encode = Callable[[Tensor], Tensor]


class CannotExplain(ValueError):
    """The method doesn't fit the model; the message says why."""


class Method(Protocol):
    """``method(model, x, targets)``: how much each pixel speaks for each target.

    Args:
        model: (N, C, H, W) -> logits (N, K). It is explained in evaluation mode, and left as it was.
        x: (N, C, H, W), what the model takes.
        targets: (N, T) integers in 0 ... K-1.

    Returns:
        (N, T, H, W), signed contributions, detached; the channels are summed over.

    Raises:
        CannotExplain: the method can't work on this model.
        ModuleNotFoundError: the library that the method leans on isn't installed; the message names it.
        ValueError: shapes that don't fit together, targets out of range.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor: ...


@contextmanager
def explaining(model: nn.Module, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluation mode and gradients on, whatever the caller has set, with copies of ``x`` and ``targets`` to work on.

    Gradients reach the input only: the weights are frozen. On CUDA no factor is rounded to TF32.

    The copies are on the device of ``x`` and ordinary tensors: autograd can't save those made in inference mode.

    Raises:
        ValueError: ``x`` is no floating-point (N, C, H, W), or ``targets`` no integers (N, T); none of them may be 0.
    """
    if x.ndim != 4 or not x.is_floating_point() or not x.numel():
        raise ValueError(f"x must be a floating-point tensor (N, C, H, W) with N >= 1, got {x.dtype} {tuple(x.shape)}")
    is_integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if targets.ndim != 2 or len(targets) != len(x) or not targets.shape[1] or not is_integer:
        raise ValueError(
            f"targets must be integers ({len(x)}, T), some for each image; got {targets.dtype} {tuple(targets.shape)}"
        )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_tf32(),
        evaluating(model),
        cached_weights(model),
    ):
        yield x.detach().clone(), targets.to(device=x.device, dtype=torch.long, copy=True)


def select(logits: Tensor, targets: Tensor) -> Tensor:
    """The targets' entries of the logits (N, K), or of their probabilities: (N, T).

    Raises:
        ValueError: not (N, K), or a target that is no class.
    """
    if logits.ndim != 2 or len(logits) != len(targets):
        raise ValueError(f"the model must return logits ({len(targets)}, K), got {tuple(logits.shape)}")
    n_classes = logits.shape[1]
    wrong = targets[(targets < 0) | (targets >= n_classes)]
    if len(wrong):
        raise ValueError(f"target {int(wrong[0])} is out of range, allowed are 0 to {n_classes - 1}")
    return logits.gather(1, targets)


def gradients(outputs: Tensor, leaf: Tensor) -> Iterator[Tensor]:
    """d outputs[:, t] / d leaf for t = 0 ... T-1, each of the leaf's shape, from one graph.

    The images must not see each other in the model, so that one backward pass serves a whole batch. Only the
    gradient of the leaf is computed, not those of the parameters.

    Args:
        outputs: (N, T).
        leaf: (N, ...).
    """
    n_targets = outputs.shape[1]
    for t in range(n_targets):
        (gradient,) = torch.autograd.grad(outputs[:, t].sum(), leaf, retain_graph=t < n_targets - 1)
        yield gradient


def perturbable(x: Tensor) -> tuple[Tensor, Encode]:
    """The part of the input that a perturbation may change, and the way back to the model's input.

    For six channels [r, g, b, 1-r, 1-g, 1-b] the image (N, 3, H, W), whose perturbed form is encoded anew; otherwise
    the input as it is.
    """
    if x.shape[1] != 6:
        return x, lambda image: image
    return x[:, :3], lambda image: torch.cat([image, 1 - image], dim=1)


def probabilities(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Logits -> probabilities: the model's own ``to_probabilities``, softmax for models without."""
    own = getattr(model, "to_probabilities", None)
    return own if own is not None else lambda logits: logits.softmax(1)


def pairs(n_images: int, n_variants: int, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of an image and a variant of it, in batches of indices (n, v): full batches for any N."""
    for flat in torch.arange(n_images * n_variants, device=device).split(batch_size):
        yield flat // n_variants, flat % n_variants


def token_grid(n_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of a transformer's tokens: those of patches whose side is a whole number of pixels.

    Returns:
        None where no such patches give this number of tokens.
    """
    for side in range(1, max(height, width) + 1):
        # A stride of several steps rounds up.
        rows, columns = -(-height // side), -(-width // side)
        if rows * columns == n_tokens:
            return rows, columns
    return None


def library(module: str, package: str) -> ModuleType:
    """Import a library that only some methods need.

    Raises:
        ModuleNotFoundError: it isn't installed; the message says how to install it.
    """
    # Some libraries draw from Python's generator when they are imported (scikit-learn does).
    state = random.getstate()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"this explanation method needs {package}: pip install {package}", name=error.name
        ) from None
    finally:
        random.setstate(state)


def check_counts(**options: int) -> None:
    """Raises ValueError for an option that is no integer of at least 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: an integer of at least 1")
