"""Intermediate features in timm's form: which ones to return, and where a resolution ends.

Axes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Required, TypedDict

from torch import Tensor, nn

from bcos_train.model.grad_checkpointing import CheckpointedBlocks

__all__ = [
    "Intermediates",
    "IntermediatesDict",
    "check_indices",
    "check_output_format",
    "last_of_each_resolution",
    "run_and_collect",
    "take_indices",
]

#: What ``forward_intermediates`` returns.
Intermediates = list[Tensor] | tuple[Tensor, list[Tensor]]


class IntermediatesDict(TypedDict, total=False):
    """What it returns with ``output_dict``, under timm's names; the features are optional."""

    image_intermediates: Required[list[Tensor]]
    image_features: Tensor


def check_indices(
    count: int, indices: int | Sequence[int] | None, key: str = "indices", what: str = "intermediate features"
) -> Sequence[int]:
    """Resolve timm's ``indices``: the last so many for an integer, all for None; negative ones count from the end.

    Args:
        key, what: Names of the argument and of the features, for the message.

    Raises:
        ValueError: There is no such feature, or ``indices`` is empty.
    """
    chosen = range(count) if indices is None else indices
    chosen = range(-chosen, 0) if isinstance(chosen, int) else chosen
    if not chosen or not all(-count <= index < count for index in chosen):
        raise ValueError(f"{key}={indices}: there are {count} {what}, 0 to {count - 1}")
    return chosen


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Resolve ``indices`` as :func:`check_indices` does, to positions from 0, sorted and each once."""
    return sorted({index % count for index in check_indices(count, indices)})


def check_output_format(output_fmt: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError for a format that the network doesn't have."""
    if output_fmt not in allowed:
        raise ValueError(f"output_fmt={output_fmt!r}: this network returns {' or '.join(allowed)}")


def last_of_each_resolution(modules: Sequence[nn.Module]) -> list[int]:
    """Return the positions of the last module at each resolution; dilated stages have one each, as in timm's ResNet."""
    ends = []
    for index, (module, following) in enumerate(pairwise(modules)):
        is_dilated = isinstance(module, CheckpointedBlocks) and isinstance(following, CheckpointedBlocks)
        if is_dilated or _reduces(following):
            ends.append(index)
    return [*ends, len(modules) - 1]


def run_and_collect(
    steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor, taps: Sequence[int], stop_early: bool
) -> tuple[Tensor, list[Tensor]]:
    """Apply the steps in turn; return the last output, and those at the positions ``taps``, which are sorted."""
    collected = []
    for index, step in enumerate(steps[: taps[-1] + 1] if stop_early else steps):
        x = step(x)
        if index in taps:
            collected.append(x)
    return x, collected


def _reduces(module: nn.Module) -> bool:
    """True if a convolution or pooling in the module has a stride."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.AvgPool2d)]
    return any(layer.stride not in (1, (1, 1)) for layer in layers)
