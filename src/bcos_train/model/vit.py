"""SimpleViT and ViT-C, as B-cos networks and as their standard twins.

The transformer is the plain one of Beyer et al. 2022 (arXiv 2205.01580): fixed sine-cosine positional embedding, no
class token, the tokens' average goes to the classifier. ViT-C puts a convolutional stem in the place of the 16x16
patches and has one block less to make up for it (Xiao et al. 2021, arXiv 2106.14881). In the B-cos networks every
linear layer, convolution and the classifier is a B-cos transform, norms have no bias and there is no activation
function; queries, keys and values come from a plain linear layer without bias, since attention is a dynamic linear
map as it is: a matrix that depends on the input, times the values (Böhle et al., TPAMI 2024, arXiv 2306.10898).
Parameter names, shapes and the order in which random numbers are drawn equal those of the official models.

Axes: N images, C channels, H height, W width, P side of a patch, T tokens, D width of a token, A attention heads,
K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.dataset.encoding import Standardize
from bcos_train.model.base import BcosModel
from bcos_train.model.conv_net import Layer, make_logit_layer
from bcos_train.model.registry import register_model
from bcos_train.model.transform import InferenceTransform
from bcos_train.nn import (
    BcosConv2d,
    BcosLinear,
    Detachable,
    DetachableGNLayerNorm2d,
    DetachableLayerNorm,
    LogitLayer,
    NoBias,
)

__all__ = ["Attention", "BcosSimpleViT", "PositionalEmbedding", "SimpleViT", "StandardSimpleViT"]


class Patches(nn.Module):
    """``(N, C, H, W) -> (N, H/P, W/P, P*P*C)``: the pixels of each patch row by row, all channels of a pixel together.

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
    """Adds a fixed sine-cosine embedding of its place to each token: ``(N, H', W', D) -> (N, H'*W', D)``.

    D/4 frequencies from 1 to 1/``temperature``, geometrically spaced, of sin x, cos x, sin y, cos y (arXiv 2205.01580).
    The module adds it itself, so that :func:`bcos_train.explanation.constant_term` finds it: it is the one part of a
    B-cos ViT besides the logit bias that does not come from the image.
    """

    def __init__(self, temperature: float = 10_000) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        return x.flatten(1, 2) + self.embedding(height, width, dim, x.device).to(x.dtype)

    def embedding(self, height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
        """``(height * width, dim)`` in float32, with which the published weights were trained, for any model dtype."""
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        omega = torch.arange(dim // 4, **options) / (dim // 4 - 1)
        omega = 1.0 / self.temperature**omega
        y, x = torch.meshgrid(torch.arange(height, **options), torch.arange(width, **options), indexing="ij")
        y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
        return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class Attention(Detachable):
    """Multi-head self-attention with a norm before it, ``(N, T, D) -> (N, T, D)``.

    In explanation mode the attention matrix is constant to autograd, so that the map from the values to the output is
    linear. The matrix is then computed step by step, which can be differentiated twice; otherwise torch's fused
    kernels compute the same, and most of those can't.
    """

    def __init__(self, dim: int, heads: int, linear_layer: Layer, norm_layer: Layer) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm_layer(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = linear_layer(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, A, T, D/A) each
        if self.detach:
            scores = q.detach() @ k.detach().transpose(-2, -1) * q.shape[-1] ** -0.5
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class FeedForward(nn.Module):
    """Norm, linear layer to ``hidden_dim``, activation, linear layer back: ``(N, T, D) -> (N, T, D)``."""

    def __init__(self, dim: int, hidden_dim: int, linear_layer: Layer, norm_layer: Layer, act_layer: Layer) -> None:
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
    """A block of the transformer: attention and feed-forward network, each added to its input."""

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, linear_layer: Layer, norm_layer: Layer, act_layer: Layer
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, linear_layer, norm_layer)
        self.ff = FeedForward(dim, mlp_dim, linear_layer, norm_layer, act_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ff(x) + x


class SimpleViT(nn.Module):
    """SimpleViT or ViT-C made of the given layers: ordinary ones with GELU unless others are given.

    Args:
        num_classes, in_chans, patch_size, stem, dim, depth, heads, mlp_dim: As for :class:`BcosSimpleViT`.
        linear_layer, conv_layer: Called as ``nn.Linear`` and ``nn.Conv2d`` are.
        norm_layer, norm2d_layer: Of tokens and of the stem's feature maps; called with the number of channels.
        act_layer: Called with nothing.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, H and W as for :class:`BcosSimpleViT`.

    Raises:
        ValueError: A size out of range.
    """

    #: Names of the parts that make the tokens, in the order in which they are applied.
    feature_names = ("to_patch_embedding", "positional_embedding", "transformer")

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        patch_size: int = 16,
        stem: Sequence[int] = (),
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_dim: int = 1536,
        linear_layer: Layer = nn.Linear,
        norm_layer: Layer = nn.LayerNorm,
        act_layer: Layer = nn.GELU,
        conv_layer: Layer = nn.Conv2d,
        norm2d_layer: Layer = DetachableGNLayerNorm2d,
    ) -> None:
        super().__init__()
        _check_sizes(num_classes, in_chans, patch_size, dim, depth, heads, mlp_dim)
        embedding: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_chans
        if stem:
            embedding["conv_stem"] = _conv_stem(in_chans, stem, conv_layer, norm2d_layer, act_layer)
            channels = stem[-1]
        embedding["patches"] = Patches(patch_size)
        embedding["linear"] = linear_layer(channels * patch_size**2, dim)
        self.to_patch_embedding = nn.Sequential(embedding)
        self.positional_embedding = PositionalEmbedding()
        block = partial(Encoder, dim, heads, mlp_dim, linear_layer, norm_layer, act_layer)
        self.transformer = nn.Sequential(OrderedDict((f"encoder_{i}", block()) for i in range(depth)))
        self.linear_head = nn.Sequential(OrderedDict(norm=norm_layer(dim), linear=linear_layer(dim, num_classes)))
        self.linear_layer = linear_layer
        self.num_features = self.head_hidden_size = dim
        self.num_classes = num_classes
        self.in_chans = in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the transformer: ``(N, in_chans, H, W) -> (N, T, D)``."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"got an input of shape {tuple(x.shape)}: expected (N, {self.in_chans}, H, W)")
        for name in self.feature_names:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(N, T, D) -> (N, K)``; with ``pre_logits`` their average after the head's norm, ``(N, D)``."""
        norm, linear = self.linear_head
        x = norm(x.mean(dim=1))
        return x if pre_logits else linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Sequential:
        """Norm and linear layer, applied to the average of the tokens."""
        return self.linear_head

    def get_feature_extractor(self) -> nn.Sequential:
        """What gives the tokens ``(N, T, D)``, sharing its modules with this model."""
        return nn.Sequential(OrderedDict((name, getattr(self, name)) for name in self.feature_names))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new linear layer with random weights in the place of the present one; the head's norm stays.

        Args:
            num_classes: K; 0 leaves the linear layer out: the model then gives ``(N, D)``.

        Raises:
            ValueError: A negative number.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: at least 0")
        reference = next(self.parameters())
        new = self.linear_layer(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        new.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.linear_head.linear = new
        self.num_classes = num_classes


class StandardSimpleViT(SimpleViT):
    """The baseline of the B-cos network, for standardised RGB.

    Without dynamic linear weights to explain it is no :class:`~bcos_train.model.BcosModel`; otherwise its methods are
    the same.
    """

    transform = InferenceTransform(256, 224, Standardize())
    #: Logits -> probabilities under the cross-entropy that these networks are trained with.
    to_probabilities = staticmethod(partial(torch.softmax, dim=-1))


class BcosSimpleViT(BcosModel):
    """B-cos SimpleViT or ViT-C: the network is ``model[0]``, temperature and bias of the logits ``model[1]``.

    Args:
        num_classes: K.
        in_chans: C; 6 for the encoding ``[r, g, b, 1-r, 1-g, 1-b]``.
        b: Exponent B of the B-cos transform (arXiv 2205.10268, eq. 3), at least 1.
        max_out: Units per output channel, of which the largest counts.
        logit_bias: Added to every logit. Default: ``-log(K - 1)``, with which a zero output means a probability 1/K.
        logit_temperature: Divides every logit before the bias is added.
        patch_size: P, of the image or, with a stem, of the stem's output.
        stem: Channels of the stem's 3x3 convolutions; wherever their number grows, the stride is 2. Empty: no stem.
        dim: D, a multiple of 4 and of ``heads``.
        depth: Blocks of the transformer.
        heads: A.
        mlp_dim: Units between the two layers of a feed-forward network.

    Shape: ``(N, in_chans, H, W) -> (N, K)``. H and W are multiples of P; with a stem and P = 1 any sizes, of which a
    sixteenth, rounded up, is left after the four strides of the published stems.

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 6,
        b: float = 2,
        max_out: int = 1,
        logit_bias: float | None = None,
        logit_temperature: float | None = None,
        patch_size: int = 16,
        stem: Sequence[int] = (),
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_dim: int = 1536,
    ) -> None:
        super().__init__()
        network = SimpleViT(
            num_classes=num_classes,
            in_chans=in_chans,
            patch_size=patch_size,
            stem=stem,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_dim=mlp_dim,
            linear_layer=partial(BcosLinear, b=b, max_out=max_out),
            norm_layer=NoBias(DetachableLayerNorm),
            act_layer=nn.Identity,
            conv_layer=partial(BcosConv2d, b=b, max_out=max_out),
            norm2d_layer=NoBias(DetachableGNLayerNorm2d),
        )
        # The official model is a sequence of the two, so these are their names in its state dict.
        self.add_module("0", network)
        self.add_module("1", make_logit_layer(num_classes, logit_temperature, logit_bias))
        self.num_features, self.head_hidden_size = network.num_features, network.head_hidden_size
        self.num_classes = num_classes
        self.in_chans = in_chans

    def __getitem__(self, index: int) -> Any:
        return list(self.children())[index]

    @property
    def logit_layer(self) -> LogitLayer:
        return self[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the transformer: ``(N, in_chans, H, W) -> (N, T, D)``."""
        return self[0].forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(N, T, D) -> (N, K)``; with ``pre_logits`` their average after the head's norm, ``(N, D)``."""
        x = self[0].forward_head(x, pre_logits)
        return self.logit_layer(x) if self.num_classes and not pre_logits else x

    def get_classifier(self) -> nn.Sequential:
        """Norm and B-cos linear layer, applied to the average of the tokens; temperature and bias come after them."""
        return self[0].get_classifier()

    def get_feature_extractor(self) -> nn.Sequential:
        """What gives the tokens ``(N, T, D)``, sharing its modules with this model."""
        return self[0].get_feature_extractor()

    def reset_classifier(self, num_classes: int) -> None:
        self[0].reset_classifier(num_classes)
        if num_classes:
            self.add_module("1", make_logit_layer(num_classes, self.logit_layer.logit_temperature, None))
        self.num_classes = num_classes


def _check_sizes(
    num_classes: int, in_chans: int, patch_size: int, dim: int, depth: int, heads: int, mlp_dim: int
) -> None:
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "patch_size": patch_size}
    for name, value in {**sizes, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if dim < 8 or dim % 4 or dim % heads:
        raise ValueError(
            f"dim={dim}: at least 8 and a multiple of 4, for the positional embedding, and of heads={heads}"
        )


def _conv_stem(
    in_chans: int, widths: Sequence[int], conv_layer: Layer, norm_layer: Layer, act_layer: Layer
) -> nn.Sequential:
    """3x3 convolutions, each with norm and activation; the first one, and each that adds channels, halves the size."""
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


#: The four sizes: D, blocks of the SimpleViT (a ViT-C has one less), heads, and the stem of the ViT-C.
_SIZES = {
    "ti": (192, 12, 3, (24, 48, 96, 192)),
    "s": (384, 12, 6, (48, 96, 192, 384)),
    "b": (768, 12, 12, (64, 128, 128, 256, 256, 512)),
    "l": (1024, 14, 16, (64, 128, 128, 256, 256, 512)),
}

for _prefix, _build in (("", BcosSimpleViT), ("standard_", StandardSimpleViT)):
    for _size, (_dim, _depth, _heads, _) in _SIZES.items():
        _options: dict[str, Any] = {"dim": _dim, "depth": _depth, "heads": _heads, "mlp_dim": 4 * _dim}
        register_model(f"{_prefix}simple_vit_{_size}_patch16_224", partial(_build, **_options))
    for _size, (_dim, _depth, _heads, _stem) in _SIZES.items():
        _options = {"dim": _dim, "depth": _depth - 1, "heads": _heads, "mlp_dim": 4 * _dim}
        register_model(f"{_prefix}vitc_{_size}_patch1_14", partial(_build, patch_size=1, stem=_stem, **_options))
