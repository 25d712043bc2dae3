"""Attention rollout: the contribution of each token to a transformer's output through attention.

Axes: N images, A attention heads, T tokens, H W pixels.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bcos_train.explanation.method.base import CannotExplain, attribution_context, select_targets, token_grid

__all__ = ["AttentionRollout"]


class _AttentionRecorder(TorchFunctionMode):
    """Record the self-attention matrices (N, A, T, T) that are computed within the block.

    It intercepts the PyTorch functions that compute them, so models need no changes: fused attention, and softmax over
    the last of four axes whose last two have the same length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        matrix: object = None
        if func is F.scaled_dot_product_attention:
            matrix = _fused_attention_matrix(*args, **kwargs)
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            matrix = result if axis in (-1, 3) else None
        if isinstance(matrix, Tensor) and matrix.ndim == 4 and matrix.shape[-1] == matrix.shape[-2]:
            self.matrices.append(matrix)
        return result


def _fused_attention_matrix(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the attention matrix, including mask and scale: the output for the identity as values."""
    identity = torch.eye(key.shape[-2], dtype=query.dtype, device=query.device).expand(*key.shape[:-1], -1)
    return F.scaled_dot_product_attention(query, key, identity, *args, **kwargs)


@dataclass(frozen=True)
class AttentionRollout:
    """Product of the attention matrices of all blocks, averaged over heads and with the residual path added.

    Source: Abnar & Zuidema, 2020, arXiv 2005.00928, sec. 3: A_L ... A_1 with A = ½ (mean over heads) + ½ I. The map is
    the row of the class token, or the mean of the rows for models that average their tokens. It is the same for every
    target, since it doesn't depend on the class.

    Args:
        interpolation: ``"nearest"`` or ``"bilinear"``, from tokens to pixels.

    Raises:
        CannotExplain: The model has no self-attention over all tokens, or its tokens are not a grid of patches.
    """

    interpolation: Literal["nearest", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r}: nearest or bilinear")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets), torch.no_grad():
            with _AttentionRecorder() as recorder:
                logits = model(x)
            select_targets(logits, targets)  # validates logits and targets
            rollout = _rollout(model, recorder.matrices, len(x))
            n_tokens, size = rollout.shape[-1], x.shape[2:]
            grid, rows = token_grid(n_tokens, *size), rollout.mean(1)
            if grid is None:
                grid, rows = token_grid(n_tokens - 1, *size), rollout[:, 0, 1:]
            if grid is None:
                raise CannotExplain(
                    f"{type(model).__name__} has {n_tokens} tokens for an image of {size[0]}x{size[1]}, which are not "
                    "those of a grid of patches, with or without a class token"
                )
            maps = F.interpolate(rows.unflatten(1, grid)[:, None], size=size, mode=self.interpolation)
            return maps.repeat(1, targets.shape[1], 1, 1)


def _rollout(model: nn.Module, matrices: list[Tensor], n_images: int) -> Tensor:
    """Return the share of each input token in each output token, (N, T, T)."""
    name = type(model).__name__
    if not matrices:
        raise CannotExplain(
            f"{name} has no self-attention that can be recorded (by scaled_dot_product_attention or softmax): "
            "attention rollout is for vision transformers"
        )
    if any(len(matrix) != n_images or matrix.shape != matrices[0].shape for matrix in matrices):
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        raise CannotExplain(
            f"{name} has attention matrices of shapes {shapes} for {n_images} images: attention rollout needs all "
            "tokens to attend to each other in every block"
        )
    n_tokens = matrices[0].shape[-1]
    identity = torch.eye(n_tokens, dtype=matrices[0].dtype, device=matrices[0].device)
    rollout = identity.expand(n_images, -1, -1)
    for matrix in matrices:
        rollout = (matrix.mean(1) + identity) / 2 @ rollout
    return rollout
