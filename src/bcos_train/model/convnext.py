"""B-cos ConvNeXt.

The architecture is ConvNeXt (Liu et al. 2022, arXiv 2201.03545) with every convolution and the classifier replaced by a
B-cos transform, no activation function, and the classifier applied at each position *before* the global average (Böhle
et al., TPAMI 2024, arXiv 2306.10898, sec. 4). Layer norm over the channels becomes position norm without bias, or
uncentered batch norm. Parameter names, shapes and the order of random draws equal those of the official models.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from bcos_train.model.base import GroupMatcher
from bcos_train.model.conv_net import (
    LONG_RECIPE_TRANSFORM,
    BcosConvNet,
    LayerFactory,
    linear_drop_probs,
    make_logit_layer,
    resolve_conv,
    resolve_norm,
)
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.model.registry import register_model
from bcos_train.nn import make_norm


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, norm, 1x1 convolutions to four times the channels and back, and layer scale."""

    def __init__(
        self,
        channels: int,
        layer_scale: float,
        stochastic_depth_prob: float,
        norm_layer: LayerFactory,
        conv_layer: LayerFactory,
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv_layer(channels, channels, kernel_size=7, padding=3, groups=channels),
            norm_layer(channels),
            conv_layer(channels, 4 * channels, kernel_size=1),
            conv_layer(4 * channels, channels, kernel_size=1),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), float(layer_scale)))
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class BcosConvNeXt(BcosConvNet):
    """B-cos ConvNeXt.

    Args:
        layers: Blocks per stage.
        channels: Channels per stage.
        num_classes: K.
        in_chans: C; 6 for the encoding ``[r, g, b, 1-r, 1-g, 1-b]``.
        norm_layer: Name for :func:`bcos_train.nn.make_norm` (``"bnu-linear"``, ``"none"``, …) or a callable
            ``channels -> Module``. Default: position norm without bias, as ``"pn-linear"`` but with ``eps=1e-6``.
        conv_layer: Callable with the signature of :class:`~bcos_train.nn.BcosConv2d`. Default: ``BcosConv2d`` with
            ``b`` and ``max_out``.
        b: Exponent B of the B-cos transform (arXiv 2205.10268, eq. 3), at least 1.
        max_out: Units per output channel; the output is their maximum.
        logit_bias: Added to every logit. Default: ``-log(K - 1)``, which maps a zero output to the probability 1/K.
        logit_temperature: Divides every logit before the bias is added.
        stochastic_depth_prob: Drop probability of the last block; it increases linearly from 0 at the first.
        layer_scale: Initial factor of each residual branch.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, H and W at least ``min_size``, 32 with four stages.

    Raises:
        ValueError: An option is out of range.
    """

    logit_conv_name = "classifier.1"
    # The published networks were trained with the long recipe.
    transform = LONG_RECIPE_TRANSFORM

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 6,
        norm_layer: str | LayerFactory | None = None,
        conv_layer: LayerFactory | None = None,
        b: float = 2,
        max_out: int = 1,
        logit_bias: float | None = None,
        logit_temperature: float | None = None,
        stochastic_depth_prob: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        if not layers or len(layers) != len(channels):
            raise ValueError(f"layers={tuple(layers)}, channels={tuple(channels)}: one number per stage in both")
        norm_layer = partial(make_norm("pn-linear"), eps=1e-6) if norm_layer is None else resolve_norm(norm_layer)
        self.conv_layer = conv_layer = resolve_conv(conv_layer, b, max_out)

        drop_probs = linear_drop_probs(stochastic_depth_prob, sum(layers))
        stem = conv_layer(in_chans, channels[0], kernel_size=4, stride=4)
        stages: list[nn.Module] = [stem, norm_layer(channels[0])]
        for stage, (depth, width) in enumerate(zip(layers, channels, strict=True)):
            blocks = [ConvNeXtBlock(width, layer_scale, next(drop_probs), norm_layer, conv_layer) for _ in range(depth)]
            stages.append(CheckpointedBlocks(*blocks))
            if stage + 1 < len(channels):
                downsample = conv_layer(width, channels[stage + 1], kernel_size=2, stride=2)
                stages.append(nn.Sequential(norm_layer(width), downsample))
        self.features = nn.Sequential(*stages)
        self.min_size = 4 * 2 ** (len(channels) - 1)

        self.num_features = self.head_hidden_size = channels[-1]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            norm_layer(self.num_features), conv_layer(self.num_features, num_classes, kernel_size=1)
        )
        self.logit_layer = make_logit_layer(num_classes, logit_temperature, logit_bias)
        self.init_convs()

    def init_conv(self, conv: nn.Conv2d) -> None:
        nn.init.trunc_normal_(conv.weight, std=0.02)

    def get_feature_extractor(self) -> nn.Module:
        return self.features

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group the stem, each block (``coarse``: each stage) with the downsampling before it, and the head."""
        blocks: list[tuple[str, tuple[int, ...] | None]] = []
        for stage in range(2, len(self.features), 2):
            first = f"{stage}" if coarse else rf"{stage}\.0"
            blocks.append((rf"features\.(?:{stage - 1}|{first})\.", (stage, 0)))
            blocks.append((rf"features\.({stage})\.(\d+)\.", None))
        return {"stem": r"features\.[01]\.", "blocks": blocks}


#: Name -> blocks and channels per stage, drop probability of the last block.
_SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320), 0.1),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 0.1),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768), 0.4),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536), 0.5),
}

for _size, (_layers, _channels, _drop_prob) in _SIZES.items():
    _builder = partial(BcosConvNeXt, layers=_layers, channels=_channels, stochastic_depth_prob=_drop_prob)
    register_model(f"convnext_{_size}", _builder)
    if _size in ("tiny", "base"):
        register_model(f"convnext_{_size}_bnu", partial(_builder, norm_layer="bnu-linear"))
