"""B-cos ResNet, ResNeXt and Wide ResNet for ImageNet and CIFAR-10.

The architecture is He et al. 2016 (stride in the 3x3 convolution, as in torchvision) with every convolution and the
classifier replaced by a B-cos transform, no activation function, average instead of maximum pooling, and the
classifier applied at each position *before* the global average (Böhle et al., TPAMI 2024, arXiv 2306.10898, sec. 4).
Parameter names, shapes and the order of random draws equal those of the official models, so that official weights load
strictly and the same seed gives the same initial weights.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from bcos_train.model.base import GroupMatcher, check_images
from bcos_train.model.conv_net import (
    CIFAR_OPTIONS,
    LONG_RECIPE_TRANSFORM,
    NO_RESIZE_TRANSFORM,
    BcosConvNet,
    LayerFactory,
    linear_drop_probs,
    make_logit_layer,
    resolve_conv,
    resolve_norm,
)
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.model.registry import Builder, register_model


class ResidualBlock(nn.Module):
    """Residual block: branch plus identity (or ``downsample``), without activation after the sum.

    ``branch`` lists the attribute names of the residual branch in the order in which they are applied.
    """

    expansion: int = 1
    branch: tuple[str, ...] = ()
    downsample: nn.Module | None

    def __init__(self, stochastic_depth_prob: float) -> None:
        super().__init__()
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row") if stochastic_depth_prob else None

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for module in self._branch():
            out = module(out)
        return out + (x if self.downsample is None else self.downsample(x))

    def _branch(self) -> list[nn.Module]:
        modules = [getattr(self, name) for name in self.branch]
        return modules if self.stochastic_depth is None else [*modules, self.stochastic_depth]


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (ResNet-18, -34 and the CIFAR ResNets)."""

    expansion = 1
    branch = ("conv1", "bn1", "conv2", "bn2")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int,
        base_width: int,
        dilation: int,
        norm_layer: LayerFactory,
        conv_layer: LayerFactory,
        stochastic_depth_prob: float,
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock takes groups=1 and width_per_group=64, got {groups=} and {base_width=}")
        if dilation > 1:
            raise ValueError(
                "replace_stride_with_dilation needs the bottleneck block (resnet50 and deeper), not the basic block"
            )
        super().__init__(stochastic_depth_prob)
        self.stride = stride
        self.conv1 = conv_layer(inplanes, planes, kernel_size=3, stride=stride, padding=1)
        self.bn1 = norm_layer(planes)
        self.conv2 = conv_layer(planes, planes, kernel_size=3, padding=1)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (strided, grouped, dilated) and 1x1 convolutions, with ``4 * planes`` output channels."""

    expansion = 4
    branch = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int,
        base_width: int,
        dilation: int,
        norm_layer: LayerFactory,
        conv_layer: LayerFactory,
        stochastic_depth_prob: float,
    ) -> None:
        super().__init__(stochastic_depth_prob)
        self.stride = stride
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv_layer(inplanes, width, kernel_size=1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv_layer(
            width, width, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, groups=groups
        )
        self.bn2 = norm_layer(width)
        self.conv3 = conv_layer(width, planes * self.expansion, kernel_size=1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample


class BcosResNet(BcosConvNet):
    """B-cos ResNet with three (CIFAR) or four (ImageNet) stages.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: Blocks per stage.
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
        stochastic_depth_prob: Drop probability of the last block; it increases linearly from 0 at the first.
        zero_init_residual: Initialize each residual branch to zero, by the weight of its last norm.
        replace_stride_with_dilation: For each stage but the first, True replaces its stride by dilation.
        inplanes: Channels of the first stage.
        small_inputs: 3x3 stem without pooling, for images around 32 px.
        groups, width_per_group: Cardinality and width of ResNeXt.

    Shape: ``(N, in_chans, H, W) -> (N, K)``.
    """

    logit_conv_name = "fc"
    #: None in networks with three stages, since users of torchvision expect the attribute.
    layer4: nn.Module | None

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
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
        stochastic_depth_prob: float = 0.0,
        zero_init_residual: bool = False,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        inplanes: int = 64,
        small_inputs: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        steps = _strides_and_dilations(len(layers), replace_stride_with_dilation)
        norm_layer = resolve_norm(norm_layer)
        self.conv_layer = conv_layer = resolve_conv(conv_layer, b, max_out)

        if small_inputs:
            self.conv1 = conv_layer(in_chans, inplanes, kernel_size=3, padding=1)
            self.pool = None
            self.transform = NO_RESIZE_TRANSFORM
        else:
            self.conv1 = conv_layer(in_chans, inplanes, kernel_size=7, stride=2, padding=3)
            self.pool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = norm_layer(inplanes)

        make_block = partial(
            _make_block, block, groups=groups, base_width=width_per_group, norm_layer=norm_layer, conv_layer=conv_layer
        )
        drop_probs = linear_drop_probs(stochastic_depth_prob, sum(layers))
        channels = inplanes
        for stage, (depth, (stride, first_dilation, dilation)) in enumerate(zip(layers, steps, strict=True)):
            planes = inplanes * 2**stage
            blocks = [make_block(channels, planes, stride, first_dilation, next(drop_probs))]
            channels = planes * block.expansion
            blocks += [make_block(channels, planes, 1, dilation, next(drop_probs)) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", CheckpointedBlocks(*blocks))
        if len(layers) == 3:
            self.layer4 = None

        self.num_features = self.head_hidden_size = channels
        self.num_classes = num_classes
        self.in_chans = in_chans
        # Official names; there they are the state of the constructor at its end.
        self.inplanes, self.dilation, self.groups, self.base_width = channels, steps[-1][2], groups, width_per_group
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = conv_layer(channels, num_classes, kernel_size=1)
        self.logit_layer = make_logit_layer(num_classes, logit_temperature, logit_bias)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        self.init_convs()
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, ResidualBlock):
                    weight = getattr(getattr(m, m.branch[-1]), "weight", None)
                    if weight is not None:
                        nn.init.zeros_(weight)

    def init_conv(self, conv: nn.Conv2d) -> None:
        # The weight of a B-cos unit is normalized, so only its direction matters.
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        for module in self._feature_modules():
            x = module(x)
        return x

    def get_feature_extractor(self) -> nn.Sequential:
        """Return the modules before the classifier, shared with this model."""
        return nn.Sequential(*self._feature_modules())

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group the stem, each block (``coarse``: each stage) and the head."""
        return {"stem": r"(?:conv1|bn1)\.", "blocks": r"layer(\d+)\." if coarse else r"layer(\d+)\.(\d+)\."}

    def _feature_modules(self) -> list[nn.Module]:
        # Not one line with `:=`, at which torch.compile would split the graph on Python 3.11.
        modules = [getattr(self, name) for name in ("conv1", "bn1", "pool", "layer1", "layer2", "layer3", "layer4")]
        return [module for module in modules if module is not None]


class LongBcosResNet(BcosResNet):
    """ResNet of the long recipe: the same network, evaluated on images resized to 232 px."""

    transform = LONG_RECIPE_TRANSFORM


def _strides_and_dilations(n_stages: int, replace: Sequence[bool] | None) -> list[tuple[int, int, int]]:
    """Return for each stage the stride and dilation of its first block and the dilation of the other blocks."""
    replace = [False] * (n_stages - 1) if replace is None else replace
    if len(replace) != n_stages - 1:
        raise ValueError(f"replace_stride_with_dilation takes {n_stages - 1} values, got {list(replace)}")
    steps, dilation = [(1, 1, 1)], 1
    for is_replaced in replace:
        # The input of the first block still has the dilation of the previous stage.
        factor = 2 if is_replaced else 1
        steps.append((2 // factor, dilation, dilation * factor))
        dilation *= factor
    return steps


def _make_block(
    block: type[BasicBlock] | type[Bottleneck],
    inplanes: int,
    planes: int,
    stride: int,
    dilation: int,
    drop_prob: float,
    *,
    groups: int,
    base_width: int,
    norm_layer: LayerFactory,
    conv_layer: LayerFactory,
) -> ResidualBlock:
    """Build a block, with a projection shortcut where the shapes of input and output differ."""
    outplanes, downsample = planes * block.expansion, None
    if stride != 1 or inplanes != outplanes:
        projection = conv_layer(inplanes, outplanes, kernel_size=1, stride=stride)
        downsample = nn.Sequential(projection, norm_layer(outplanes))
    return block(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer, conv_layer, drop_prob)


def _register(network: Builder, options_by_name: Mapping[str, Mapping[str, object]], /, **common: object) -> None:
    for name, options in options_by_name.items():
        register_model(name, partial(network, **{**common, **options}))


_register(
    BcosResNet,
    {
        "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
        "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
        "resnet50": {"layers": (3, 4, 6, 3)},
        "resnet101": {"layers": (3, 4, 23, 3)},
        "resnet152": {"layers": (3, 8, 36, 3)},
        "resnext50_32x4d": {"layers": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
        "resnext101_32x8d": {"layers": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
        "wide_resnet50_2": {"layers": (3, 4, 6, 3), "width_per_group": 128},
        "wide_resnet101_2": {"layers": (3, 4, 23, 3), "width_per_group": 128},
    },
    block=Bottleneck,
)
_register(
    LongBcosResNet,
    {"resnet50_long": {"layers": (3, 4, 6, 3)}, "resnet152_long": {"layers": (3, 8, 36, 3)}},
    block=Bottleneck,
    stochastic_depth_prob=0.1,
)

_register(
    BcosResNet,
    {f"resnet{6 * n + 2}": {"layers": (n, n, n)} for n in (3, 5, 7, 9, 18)},
    block=BasicBlock,
    inplanes=16,
    **CIFAR_OPTIONS,
)
_register(
    BcosResNet,
    {
        f"resnext{9 * n + 2}_{groups}x{width}d": {"layers": (n, n, n), "groups": groups, "width_per_group": width}
        for n in (3, 5, 7, 11)
        for groups, width in ((32, 4), (16, 8))
    },
    block=Bottleneck,
    inplanes=16,
    **CIFAR_OPTIONS,
)
# The wide networks of the ResNeXt paper (arXiv 1611.05431) have its 64 channels in the first stage.
_register(
    BcosResNet,
    {f"resnext29_{groups}x64d": {"layers": (3, 3, 3), "groups": groups, "width_per_group": 64} for groups in (8, 16)},
    block=Bottleneck,
    inplanes=64,
    **CIFAR_OPTIONS,
)
