"""Interface of explanation methods, and functions that several of them share.

Axes: N images, T targets per image, C channels of the model's input, H W pixels, K classes, V perturbed variants per
image.
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
    "attribution_context",
    "check_positive_integers",
    "image_and_encoder",
    "image_variant_batches",
    "import_optional",
    "probability_function",
    "select_targets",
    "target_gradients",
    "token_grid",
]

Encode = Callable[[Tensor], Tensor]


class CannotExplain(ValueError):
    """The method doesn't apply to the model; the message says why."""


class Method(Protocol):
    """``method(model, x, targets)`` returns the contribution of each pixel to each target.

    Args:
        model: (N, C, H, W) -> logits (N, K). It is explained in evaluation mode; its own mode is restored.
        x: (N, C, H, W), the model's input.
        targets: (N, T) integers in 0 ... K-1.

    Returns:
        (N, T, H, W): signed contributions, summed over channels and detached.

    Raises:
        CannotExplain: The method doesn't apply to this model.
        ModuleNotFoundError: A library that the method needs isn't installed; the message names it.
        ValueError: Shapes don't match, or targets are out of range.
    """

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor: ...


@contextmanager
def attribution_context(model: nn.Module, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Enable evaluation mode and gradients, and return copies of ``x`` and ``targets`` that may be modified.

    Weights are treated as constants: gradients only flow to the input. On CUDA nothing is rounded to TF32. The copies
    are on the device of ``x`` and are no inference tensors, which autograd could not save.

    Raises:
        ValueError: ``x`` is not floating-point (N, C, H, W) or ``targets`` are not integers (N, T), with all sizes at
            least 1.
    """
    if x.ndim != 4 or not x.is_floating_point() or not x.numel():
        raise ValueError(f"x must be a floating-point tensor (N, C, H, W) with N >= 1, got {x.dtype} {tuple(x.shape)}")
    is_integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if targets.ndim != 2 or len(targets) != len(x) or not targets.shape[1] or not is_integer:
        raise ValueError(
            f"targets must be integers ({len(x)}, T) with T >= 1, got {targets.dtype} {tuple(targets.shape)}"
        )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_tf32(),
        evaluating(model),
        cached_weights(model),
    ):
        yield x.detach().clone(), targets.to(device=x.device, dtype=torch.long, copy=True)


def select_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the targets' entries of logits or probabilities: (N, K) -> (N, T).

    Raises:
        ValueError: The logits are not (N, K), or a target is not a class.
    """
    if logits.ndim != 2 or len(logits) != len(targets):
        raise ValueError(f"the model must return logits ({len(targets)}, K), got {tuple(logits.shape)}")
    n_classes = logits.shape[1]
    invalid = targets[(targets < 0) | (targets >= n_classes)]
    if len(invalid):
        raise ValueError(f"target {int(invalid[0])} is out of range, allowed are 0 to {n_classes - 1}")
    return logits.gather(1, targets)


def target_gradients(outputs: Tensor, leaf: Tensor) -> Iterator[Tensor]:
    """Yield d outputs[:, t] / d leaf for t = 0 ... T-1, each with the leaf's shape, from one graph.

    One backward pass covers the whole batch, so an image's outputs must not depend on other images. Gradients of
    parameters are not computed.

    Args:
        outputs: (N, T).
        leaf: (N, ...).
    """
    n_targets = outputs.shape[1]
    for t in range(n_targets):
        (gradient,) = torch.autograd.grad(outputs[:, t].sum(), leaf, retain_graph=t < n_targets - 1)
        yield gradient


def image_and_encoder(x: Tensor) -> tuple[Tensor, Encode]:
    """Return the image to perturb, and the function that encodes a perturbed image as the model's input.

    With six channels [r, g, b, 1-r, 1-g, 1-b] the image is (N, 3, H, W); otherwise it is the unchanged input and the
    function is the identity.
    """
    if x.shape[1] != 6:
        return x, lambda image: image
    return x[:, :3], lambda image: torch.cat([image, 1 - image], dim=1)


def probability_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's map from logits to probabilities, ``to_probabilities``, or softmax for models without it."""
    to_probabilities = getattr(model, "to_probabilities", None)
    return to_probabilities if to_probabilities is not None else lambda logits: logits.softmax(1)


def image_variant_batches(
    n_images: int, n_variants: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield index batches (n, v) over all pairs of an image and a variant; all batches but the last are full."""
    for flat in torch.arange(n_images * n_variants, device=device).split(batch_size):
        yield flat // n_variants, flat % n_variants


def token_grid(n_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Infer rows and columns of a transformer's tokens, for square patches of a whole number of pixels.

    Returns:
        (rows, columns), or None if no such patches result in this number of tokens.
    """
    for side in range(1, max(height, width) + 1):
        # A stride of several steps rounds up.
        rows, columns = -(-height // side), -(-width // side)
        if rows * columns == n_tokens:
            return rows, columns
    return None


def import_optional(module: str, package: str) -> ModuleType:
    """Import a library that only some methods need.

    Raises:
        ModuleNotFoundError: It isn't installed; the message says how to install it.
    """
    # Importing scikit-learn draws from Python's random generator.
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


def check_positive_integers(**options: int) -> None:
    """Raise a ValueError for an option that is not an integer of at least 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: an integer of at least 1")
