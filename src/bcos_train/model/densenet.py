"""B-cos DenseNet for ImageNet and CIFAR-10.

The architecture is DenseNet-BC (Huang et al. 2017, arXiv 1608.06993) with every convolution and the classifier replaced
by a B-cos transform, no activation function, average instead of maximum pooling, and the classifier applied at each
position *before* the global average (Böhle et al., TPAMI 2024, arXiv 2306.10898, sec. 4). Parameter names, shapes and
the order in which random numbers are drawn equal those of the official models.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bcos_train.model.base import PREVIOUS_GROUP, GroupMatcher
from bcos_train.model.conv_net import (
    CIFAR_OPTIONS,
    LONG_RECIPE_TRANSFORM,
    NO_RESIZE_TRANSFORM,
    BcosConvNet,
    LayerFactory,
    make_logit_layer,
    resolve_conv,
    resolve_norm,
)
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.model.registry import Builder, register_model


class DenseLayer(nn.Module):
    """Bottleneck layer: all feature maps of the block -> ``bn_size * growth_rate`` -> ``growth_rate`` new ones."""

    def __init__(
        self,
        inplanes: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        norm_layer: LayerFactory,
        conv_layer: LayerFactory,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = norm_layer(inplanes)
        self.conv1 = conv_layer(inplanes, width, kernel_size=1)
        self.norm2 = norm_layer(width)
        self.conv2 = conv_layer(width, growth_rate, kernel_size=3, padding=1)
        self.drop_rate = drop_rate

    def forward(self, *features: Tensor) -> Tensor:
        out = self.conv1(self.norm1(torch.cat(features, dim=1)))
        return F.dropout(self.conv2(self.norm2(out)), self.drop_rate, self.training)


class DenseBlock(CheckpointedBlocks):
    """Dense block: the input of each layer is the block's input and the outputs of all layers before it.

    ``make_layer`` builds a layer from its number of input channels; ``out_channels`` is that of the block's output.
    """

    def __init__(self, depth: int, inplanes: int, growth_rate: int, make_layer: Callable[[int], DenseLayer]) -> None:
        layers = {f"denselayer{i + 1}": make_layer(inplanes + i * growth_rate) for i in range(depth)}
        super().__init__(OrderedDict(layers))
        self.out_channels = inplanes + depth * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(self.run_block([layer], *features))
        return torch.cat(features, dim=1)


class BcosDenseNet(BcosConvNet):
    """B-cos DenseNet with any number of dense blocks.

    Args:
        growth_rate: Channels added by each layer.
        block_config: Layers per dense block; transitions between blocks halve the resolution and the channels.
        num_init_features: Channels of the stem.
        bn_size: Channels of a layer's bottleneck, in multiples of ``growth_rate``.
        drop_rate: Dropout probability after each layer, in [0, 1).
        num_classes: K.
        in_chans: C; 6 for the encoding ``[r, g, b, 1-r, 1-g, 1-b]``.
        norm_layer: Name for :func:`bcos_train.nn.make_norm` (``"bnu-linear"``, ``"none"``, …) or a callable
            ``channels -> Module``.
        conv_layer: Callable with the signature of :class:`~bcos_train.nn.BcosConv2d`. Default: ``BcosConv2d`` with
            ``b`` and ``max_out``.
        b: Exponent B of the B-cos transform (arXiv 2205.10268, eq. 3), at least 1.
        max_out: Units per output channel; the output is their maximum.
        logit_bias: Added to every logit. Default: ``-log(K - 1)``, which maps a zero output to the probability 1/K.
        logit_temperature: Divides every logit before the bias is added.
        memory_efficient: Call ``set_grad_checkpointing()``: recompute the concatenated features and activations of each
            layer in the backward pass (arXiv 1707.06990).
        small_inputs: 3x3 stem without norm and pooling, for images around 32 px.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, H and W at least ``min_size``.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        *,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 6,
        norm_layer: str | LayerFactory = "bnu-linear",
        conv_layer: LayerFactory | None = None,
        b: float = 2,
        max_out: int = 1,
        logit_bias: float | None = None,
        logit_temperature: float | None = None,
        memory_efficient: bool = False,
        small_inputs: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate}: at least 0 and less than 1")
        if not block_config:
            raise ValueError("block_config=(): at least one block")
        norm_layer = resolve_norm(norm_layer)
        self.conv_layer = conv_layer = resolve_conv(conv_layer, b, max_out)

        self.features = _stem(in_chans, num_init_features, small_inputs, norm_layer, conv_layer)
        n_transitions = len(block_config) - 1
        # Transitions round the size down, the two strides of the stem round it up.
        self.min_size = 2**n_transitions if small_inputs else 4 * 2**n_transitions - 3
        if small_inputs:
            self.transform = NO_RESIZE_TRANSFORM

        make_layer = partial(
            DenseLayer,
            growth_rate=growth_rate,
            bn_size=bn_size,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            conv_layer=conv_layer,
        )
        channels = num_init_features
        for i, depth in enumerate(block_config, start=1):
            block = DenseBlock(depth, channels, growth_rate, make_layer)
            self.features.add_module(f"denseblock{i}", block)
            channels = block.out_channels
            if i <= n_transitions:
                self.features.add_module(f"transition{i}", _transition(channels, norm_layer, conv_layer))
                channels //= 2
        self.features.add_module("norm5", norm_layer(channels))

        self.num_features = self.head_hidden_size = channels
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.classifier = conv_layer(channels, num_classes, kernel_size=1)
        self.logit_layer = make_logit_layer(num_classes, logit_temperature, logit_bias)
        self.init_convs()
        if memory_efficient:
            self.set_grad_checkpointing()

    def init_conv(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight)

    def get_feature_extractor(self) -> nn.Module:
        return self.features

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group the stem, each layer (``coarse``: each block) with the transition or norm after it, and the head."""
        stem = r"features\.(?:conv0|norm0)\."
        last = (r"features\.norm5\.", PREVIOUS_GROUP)
        if coarse:
            return {"stem": stem, "blocks": [(r"features\.(?:denseblock|transition)(\d+)\.", None), last]}
        layers = (r"features\.denseblock(\d+)\.denselayer(\d+)\.", None)
        return {"stem": stem, "blocks": [layers, (r"features\.transition(\d+)\.", PREVIOUS_GROUP), last]}


class LongBcosDenseNet(BcosDenseNet):
    """DenseNet of the long recipe: the same network, evaluated on images resized to 232 px."""

    transform = LONG_RECIPE_TRANSFORM


def _stem(
    in_chans: int, channels: int, small_inputs: bool, norm_layer: LayerFactory, conv_layer: LayerFactory
) -> nn.Sequential:
    if small_inputs:
        return nn.Sequential(OrderedDict(conv0=conv_layer(in_chans, channels, kernel_size=3, padding=1)))
    return nn.Sequential(
        OrderedDict(
            conv0=conv_layer(in_chans, channels, kernel_size=7, stride=2, padding=3),
            norm0=norm_layer(channels),
            pool0=nn.AvgPool2d(kernel_size=3, stride=2, padding=1),
        )
    )


def _transition(channels: int, norm_layer: LayerFactory, conv_layer: LayerFactory) -> nn.Sequential:
    """Build a transition, which halves channels and resolution."""
    return nn.Sequential(
        OrderedDict(
            norm=norm_layer(channels),
            conv=conv_layer(channels, channels // 2, kernel_size=1),
            pool=nn.AvgPool2d(kernel_size=2, stride=2),
        )
    )


register_model("densenet121", partial(BcosDenseNet, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64))
register_model("densenet161", partial(BcosDenseNet, growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96))
register_model("densenet169", partial(BcosDenseNet, growth_rate=32, block_config=(6, 12, 32, 32), num_init_features=64))
register_model("densenet201", partial(BcosDenseNet, growth_rate=32, block_config=(6, 12, 48, 32), num_init_features=64))
register_model(
    "densenet121_long",
    partial(LongBcosDenseNet, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64),
)

# For CIFAR-10, with depths and growth rates of arXiv 1608.06993, and a small one. There are no official models: norm
# and MaxOut are those of the official norm study on CIFAR-10.
for _depth, _growth_rate in {52: 12, 100: 12, 190: 40, 250: 24}.items():
    _builder: Builder = partial(
        BcosDenseNet,
        growth_rate=_growth_rate,
        block_config=((_depth - 4) // 6,) * 3,
        num_init_features=2 * _growth_rate,
    )
    register_model(f"densenet{_depth}", partial(_builder, **CIFAR_OPTIONS))
