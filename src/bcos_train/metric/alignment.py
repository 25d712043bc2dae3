"""Alignment of the weights of B-cos layers with their inputs."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from bcos_train.explanation import evaluating, without_tf32
from bcos_train.explanation.hooks import forward_hooks
from bcos_train.nn.functional import maxout
from bcos_train.nn.layer import BcosLayer

__all__ = ["cosine_alignment"]


@torch.no_grad()
@without_tf32()
def cosine_alignment(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Compute the mean |cos(x, w)| of every B-cos layer.

    This is the factor that the exponent B - 1 applies to, and that training increases. It is averaged over images,
    positions and output units, after MaxOut (Böhle et al., arXiv 2205.10268, eq. 3), in evaluation mode. The model's
    modes and buffers and the states of the random number generators are unchanged.

    Args:
        model: Model with BcosConv2d or BcosLinear layers.
        x: (N, C, H, W), the model's input.

    Returns:
        Layer name (as in ``named_modules``) -> mean in [0, 1], in the order of the model. Layers that were not called
        are omitted; a layer that is called several times is averaged over its calls.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BcosLayer)}
    owners: dict[nn.Module, tuple[str, BcosLayer]] = {layer.linear: (name, layer) for name, layer in layers.items()}

    def record(linear: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], product: Tensor) -> None:
        name, layer = owners[linear]
        cosine = maxout(product, layer.max_out, layer.unit_dim) / layer.input_norm(args[0])
        sums[name] += cosine.abs().float().mean().item() * cosine.numel()
        counts[name] += cosine.numel()

    with evaluating(model), forward_hooks(owners, record):
        model(x)
    return {name: sums[name] / counts[name] for name in layers if counts[name]}
