"""Attention rollout: which tokens a transformer's attention has gathered its output from.

Axes: N images, A attention heads, T tokens, H W pixels.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bcos_train.explanation.method.base import CannotExplain, explaining, select, token_grid

__all__ = ["AttentionRollout"]


class _AttentionRecorder(TorchFunctionMode):
    """Notes the attention matrices (N, A, T, T) of self-attention that are computed in the block.

    It listens to the two functions of torch that compute them, so no model has to know of it: the fused one, and
    softmax over the last of four axes, the last two of which are equally long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        matrix = None
        if func is F.scaled_dot_product_attention:
            matrix = _fused_matrix(*args, **kwargs)
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            matrix = result if axis in (-1, 3) else None
        if matrix is not None and matrix.ndim == 4 and matrix.shape[-1] == matrix.shape[-2]:
            self.matrices.append(matrix)
        return result


def _fused_matrix(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """With the identity for values the output is the matrix itself, mask and scale included."""
    identity = torch.eye(key.shape[-2], dtype=query.dtype, device=query.device).expand(*key.shape[:-1], -1)
    return F.scaled_dot_product_attention(query, key, identity, *args, **kwargs)


@dataclass(frozen=True)
class AttentionRollout:
    """The product of all blocks' attention matrices, averaged over heads and with the residual path added.

    Source: Abnar & Zuidema, 2020, arXiv 2005.00928, sec. 3: A_L ... A_1 with A = ½ (mean over heads) + ½ I. What is
    shown is the row of the class token, or for models that average their tokens the mean of the rows. It is the same
    for every target, since it doesn't look at the class.

    Args:
        interpolation: from tokens to pixels.

    Raises:
        CannotExplain: the model has no self-attention among all tokens, or its tokens are not a grid of patches.
    """

    interpolation: Literal["nearest", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation={self.interpolation!r}: nearest or bilinear")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets), torch.no_grad():
            with _AttentionRecorder() as recorder:
                logits = model(x)
            select(logits, targets)  # for its checks
            rollout = _roll_out(model, recorder.matrices, len(x))
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


def _roll_out(model: nn.Module, matrices: list[Tensor], n_images: int) -> Tensor:
    """(N, T, T): how much of each input token is in each output token."""
    name = type(model).__name__
    if not matrices:
        raise CannotExplain(
            f"{name} computes no self-attention that can be seen (by scaled_dot_product_attention or softmax): "
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
