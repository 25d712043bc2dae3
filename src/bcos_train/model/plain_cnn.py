"""Plain nine-layer B-cos network for CIFAR-10, from the first B-cos paper.

Nine B-cos convolutions in sequence, with MaxOut, without norm layers and without shortcuts (Böhle et al., CVPR
2022, arXiv 2205.10268, sec. 4 and supplement; the authors' experiments ``9L-M2-B*``). Two constants replace the
norms: each layer's output is divided by a scale, since |cos|^(B-1) <= 1 shrinks it more for greater B, and the logits
are divided by a temperature. Both are fixed factors, so W(x) x is the whole output except for the logit bias.

The convolutions are the children ``0`` to ``8``, as in the authors' checkpoints, which therefore load strictly.

Axes: N images, C channels, H height, W width, K classes.
"""

from functools import partial

from torch import Tensor, nn

from bcos_train.model.base import GroupMatcher, check_images
from bcos_train.model.conv_net import NO_RESIZE_TRANSFORM, BcosConvNet, make_logit_layer
from bcos_train.model.registry import register_model
from bcos_train.nn import BcosConv2d
from bcos_train.utils.suggestions import join_words

__all__ = ["BcosPlainCnn", "ScaledBcosConv2d"]

#: Channels and stride of the eight 3x3 convolutions; the ninth, 1x1, is the classifier.
LAYERS = ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1))

#: B -> logit temperature of the authors' experiments.
LOGIT_TEMPERATURES = {1: 1e-3, 1.25: 1e-3, 1.5: 1e-2, 1.75: 1e1, 2: 1e2, 2.25: 1e2, 2.5: 1e3}


class ScaledBcosConv2d(BcosConv2d):
    """B-cos convolution with its output divided by :attr:`scale`, a positive constant."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        b: float,
        max_out: int,
        scale: float,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, b=b, max_out=max_out)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"


class BcosPlainCnn(BcosConvNet):
    """Nine-layer B-cos network without norms.

    Args:
        num_classes: K.
        in_chans: C; 6 for the encoding ``[r, g, b, 1-r, 1-g, 1-b]``.
        b: Exponent B of the B-cos transform (arXiv 2205.10268, eq. 3), at least 1.
        max_out: Units per output channel; the output is their maximum.
        layer_scale: Divides the output of every layer. Default: ``10 ** (-2 + 1.5 * (2.5 - b))``, as in the paper.
        logit_temperature: Divides the logits. Default: see :data:`LOGIT_TEMPERATURES`.
        logit_bias: Added to every logit. Default: ``-log(K - 1)``; for ten classes, log(.1 / .9) as in the paper.

    Raises:
        ValueError: There is no default for this ``b``, or a number is out of range.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, any H and W.
    """

    logit_conv_name = "8"
    transform = NO_RESIZE_TRANSFORM

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 6,
        b: float = 2,
        max_out: int = 2,
        layer_scale: float | None = None,
        logit_temperature: float | None = None,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        layer_scale, logit_temperature = _scales(b, layer_scale, logit_temperature)
        self.conv_layer = conv_layer = partial(ScaledBcosConv2d, b=b, max_out=max_out, scale=layer_scale)
        channels = in_chans
        for index, (out_channels, stride) in enumerate(LAYERS):
            self.add_module(str(index), conv_layer(channels, out_channels, kernel_size=3, stride=stride, padding=1))
            channels = out_channels
        self.add_module(self.logit_conv_name, conv_layer(channels, num_classes, kernel_size=1))
        self.logit_layer = make_logit_layer(num_classes, logit_temperature, logit_bias)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels

    def init_conv(self, conv: nn.Conv2d) -> None:
        conv.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        for module in self._feature_modules():
            x = module(x)
        return x

    def get_feature_extractor(self) -> nn.Sequential:
        """Return the modules before the classifier, shared with this model."""
        return nn.Sequential(*self._feature_modules())

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group each layer, coarse or not."""
        return {"stem": r"0\.", "blocks": rf"([1-{len(LAYERS) - 1}])\."}

    def _feature_modules(self) -> list[nn.Module]:
        return [getattr(self, str(index)) for index in range(len(LAYERS))]


def _scales(b: float, layer_scale: float | None, logit_temperature: float | None) -> tuple[float, float]:
    """Resolve layer scale and logit temperature; the defaults are the paper's values for this B."""
    if layer_scale is None or logit_temperature is None:
        if b not in LOGIT_TEMPERATURES:
            known = join_words((f"{known:g}" for known in LOGIT_TEMPERATURES), last="and")
            raise ValueError(
                f"b={b:g}: layer_scale and logit_temperature have defaults for b = {known}; set both for another b"
            )
        layer_scale = 10 ** (-2 + 1.5 * (2.5 - b)) if layer_scale is None else layer_scale
        logit_temperature = LOGIT_TEMPERATURES[b] if logit_temperature is None else logit_temperature
    if not 0 < layer_scale < float("inf"):
        raise ValueError(f"layer_scale={layer_scale}: expected a finite number > 0")
    return layer_scale, logit_temperature


register_model("plain_cnn9", BcosPlainCnn)
