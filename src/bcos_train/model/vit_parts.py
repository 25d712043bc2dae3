"""Modules of the ViTs: patches, positional embedding, attention, feed-forward network, convolutional stem.

Axes: N images, C channels, H height, W width, P patch size, T tokens, D token dimension, A attention heads.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.model.conv_net import LayerFactory
from bcos_train.nn import Detachable, Linear

__all__ = ["Attention", "Encoder", "Patches", "PositionalEmbedding", "conv_stem"]


class Patches(nn.Module):
    """Split images into patches: ``(N, C, H, W) -> (N, H/P, W/P, P*P*C)``, pixels row by row, channels last.

    Raises:
        ValueError: H or W is not a multiple of P.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        size = self.patch_size
        if x.shape[2] % size or x.shape[3] % size or not x.shape[2] * x.shape[3]:
            raise ValueError(
                f"got images of {x.shape[2]}x{x.shape[3]} pixels: height and width must be multiples of {size}, "
                f"the side of a patch ({size}, {2 * size}, …, {14 * size}, …)"
            )
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)


class PositionalEmbedding(nn.Module):
    """Add a fixed sine-cosine embedding of its position to each token: ``(N, H', W', D) -> (N, H'*W', D)``.

    D/4 frequencies from 1 to 1/``temperature``, geometrically spaced, of sin x, cos x, sin y, cos y (arXiv 2205.01580).
    The addition is part of the module, so that :func:`bcos_train.explanation.constant_term` detects it: besides the
    logit bias, it is the only part of a B-cos ViT that doesn't depend on the image.
    """

    def __init__(self, temperature: float = 10_000) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        return x.flatten(1, 2) + self.embedding(height, width, dim, x.device).to(x.dtype)

    def embedding(self, height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
        """Return the embedding ``(height * width, dim)``, in float32 as in training of the published weights."""

        def arange(n: int) -> Tensor:
            return torch.arange(n, device=device, dtype=torch.float32)

        omega = arange(dim // 4) / (dim // 4 - 1)
        omega = 1.0 / self.temperature**omega
        y, x = torch.meshgrid(arange(height), arange(width), indexing="ij")
        y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
        return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class Attention(Detachable):
    """Pre-norm multi-head self-attention, ``(N, T, D) -> (N, T, D)``.

    In explanation mode the attention matrix is detached, so that the map from the values to the output is linear. It is
    then computed explicitly, which can be differentiated twice; most of PyTorch's fused kernels, which are used
    otherwise, can't.
    """

    def __init__(self, dim: int, heads: int, linear_layer: LayerFactory, norm_layer: LayerFactory) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.norm = norm_layer(dim)
        self.to_qkv = Linear(dim, 3 * dim, bias=False)
        self.to_out = linear_layer(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, A, T, D/A) each
        if self.detach:
            scores = q @ k.transpose(-2, -1) * self.scale
            out = self.hold(scores.softmax(dim=-1)) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class FeedForward(nn.Module):
    """Norm, linear layer to ``hidden_dim``, activation, linear layer back: ``(N, T, D) -> (N, T, D)``."""

    def __init__(
        self, dim: int, hidden_dim: int, linear_layer: LayerFactory, norm_layer: LayerFactory, act_layer: LayerFactory
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(
                norm=norm_layer(dim),
                linear1=linear_layer(dim, hidden_dim),
                act=act_layer(),
                linear2=linear_layer(hidden_dim, dim),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """Transformer block: attention and feed-forward network, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        linear_layer: LayerFactory,
        norm_layer: LayerFactory,
        act_layer: LayerFactory,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, linear_layer, norm_layer)
        self.ff = FeedForward(dim, mlp_dim, linear_layer, norm_layer, act_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ff(x) + x


def conv_stem(
    in_chans: int, widths: Sequence[int], conv_layer: LayerFactory, norm_layer: LayerFactory, act_layer: LayerFactory
) -> nn.Sequential:
    """Build 3x3 convolutions with norm and activation; the first one and each that adds channels have stride 2."""
    if min(widths) < 1:
        raise ValueError(f"stem={tuple(widths)}: each convolution has at least 1 channel")
    layers: list[nn.Module] = []
    channels = in_chans
    for i, width in enumerate(widths):
        stride = 2 if i == 0 or width > channels else 1
        conv = conv_layer(channels, width, kernel_size=3, stride=stride, padding=1)
        layers += [conv, norm_layer(width), act_layer()]
        channels = width
    return nn.Sequential(*layers)
