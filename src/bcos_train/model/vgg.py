"""B-cos VGG.

The architecture is VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) with every convolution replaced by a B-cos
transform, no activation function and no dropout, average instead of maximum pooling, and the three fully connected
layers as convolutions (7x7, 1x1, 1x1) that are applied at each position *before* the global average (Böhle et al.,
TPAMI 2024, arXiv 2306.10898, sec. 4). Parameter names, shapes and the order of random draws equal those of the
official models.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from bcos_train.model.base import GroupMatcher
from bcos_train.model.conv_net import BcosConvNet, LayerFactory, make_logit_layer, resolve_conv, resolve_norm
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.model.registry import register_model


class BcosVGG(BcosConvNet):
    """B-cos VGG.

    Args:
        layers: Convolutions per stage; each stage halves the resolution at its end.
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
        no_pool: Use stride 2 in the last convolution of each stage instead of pooling.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, H and W at least 32 (with ``no_pool`` at least 1).
    """

    logit_conv_name = "classifier.2"
    #: Channels of the stages.
    planes = (64, 128, 256, 512, 512)

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 6,
        norm_layer: str | LayerFactory = "bnu-linear",
        conv_layer: LayerFactory | None = None,
        b: float = 2,
        max_out: int = 1,
        logit_bias: float | None = None,
        logit_temperature: float | None = None,
        no_pool: bool = False,
    ) -> None:
        super().__init__()
        if len(layers) != len(self.planes) or min(layers) < 1:
            raise ValueError(f"layers={tuple(layers)}: {len(self.planes)} numbers of at least 1")
        norm_layer = resolve_norm(norm_layer)
        self.conv_layer = conv_layer = resolve_conv(conv_layer, b, max_out)

        channels = in_chans
        features: list[nn.Module] = []
        for depth, planes in zip(layers, self.planes, strict=True):
            for i in range(depth):
                stride = 2 if no_pool and i == depth - 1 else 1
                features.append(conv_layer(channels, planes, kernel_size=3, stride=stride, padding=1))
                # Without norm, an nn.Identity takes its index, which is part of the state-dict keys.
                features.append(norm_layer(planes))
                channels = planes
            if not no_pool:
                features.append(nn.AvgPool2d(kernel_size=2, stride=2))
        self.features = CheckpointedBlocks(*features)
        # One block per stage: single convolutions would save little, since most of the memory is their inputs.
        self.features.block_lengths = tuple(2 * depth + (not no_pool) for depth in layers)
        self.min_size = 1 if no_pool else 2 ** len(layers)

        self.num_features = channels
        self.head_hidden_size = 4096
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.classifier = nn.Sequential(
            conv_layer(channels, self.head_hidden_size, kernel_size=7, padding=3),
            conv_layer(self.head_hidden_size, self.head_hidden_size, kernel_size=1),
            conv_layer(self.head_hidden_size, num_classes, kernel_size=1),
        )
        self.logit_layer = make_logit_layer(num_classes, logit_temperature, logit_bias)
        self.init_convs()

    def init_conv(self, conv: nn.Conv2d) -> None:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def get_feature_extractor(self) -> nn.Module:
        return self.features

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group the stem, each further convolution with its norm (``coarse``: each stage), and the head."""
        blocks: list[tuple[str, tuple[int, ...] | None]] = []
        start = 0
        for stage, length in enumerate(self.features.block_lengths):
            for index in range(start, start + length - 1, 2):
                group = (stage,) if coarse else (stage, index)
                blocks.append((rf"features\.(?:{index}|{index + 1})\.", group))
            start += length
        return {"stem": r"features\.[01]\.", "blocks": blocks}


for _depth, _layers in {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}.items():
    register_model(f"vgg{_depth}", partial(BcosVGG, layers=_layers, norm_layer="none"))
    register_model(f"vgg{_depth}_bnu", partial(BcosVGG, layers=_layers))
