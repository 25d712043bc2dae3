"""What the convolutional B-cos networks share.

Their classifier is a convolution that gives a logit at each position; the global average comes after it (Böhle et al.,
TPAMI 2024, arXiv 2306.10898, sec. 4). So every position's contribution to a logit passes through one and the same
linear map, and images of any size can be classified.

Axes: N images, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from bcos_train.dataset.encoding import BcosEncoding
from bcos_train.model.base import BcosModel, check_images, resolve_pooling
from bcos_train.model.transform import InferenceTransform
from bcos_train.nn import BcosConv2d, LogitLayer, make_norm

__all__ = [
    "CIFAR_OPTIONS",
    "LONG_TRANSFORM",
    "PLAIN_TRANSFORM",
    "BcosConvNet",
    "Layer",
    "linear_drop_probs",
    "make_logit_layer",
    "resolve_conv",
    "resolve_norm",
]

#: A norm is called with the number of channels, a convolution as :class:`~bcos_train.nn.BcosConv2d` is.
Layer = Callable[..., nn.Module]

#: Of the networks for small images: the image as it is.
PLAIN_TRANSFORM = InferenceTransform(None, 224, BcosEncoding())
#: Of the published networks of the long recipe (`bcos_final_long`), which were evaluated on a tighter crop.
LONG_TRANSFORM = InferenceTransform(232, 224, BcosEncoding())

#: The CIFAR-10 networks of the norm study: MaxOut over two units, as in the official `norm_ablations_final`.
CIFAR_OPTIONS: dict[str, Any] = {"num_classes": 10, "small_inputs": True, "max_out": 2}


class BcosConvNet(BcosModel):
    """Features ``(N, C, H', W')``, a classifier at each position, the global average, temperature and bias.

    Subclasses set the attributes below and define ``get_feature_extractor`` and ``init_conv``.
    """

    #: Where the convolution that gives the logits is registered. A path with a dot names the last part of the
    #: classifier, an ``nn.Sequential``.
    logits_name: str = "classifier"
    #: Least height and width of an image, in pixels, of which the features have a position left.
    min_size: int = 1
    logit_layer: LogitLayer
    conv_layer: Layer

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before the classifier: ``(N, in_chans, H, W) -> (N, num_features, H', W')``.

        Raises:
            ValueError: Another number of axes or channels, or H or W below ``min_size``.
        """
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        return self.get_feature_extractor()(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map ``(N, num_features, H', W') -> (N, K)``, or ``(N, head_hidden_size)`` with ``pre_logits``.

        Without the average (``global_pool=""``) the latter is ``(N, head_hidden_size, H', W')``.
        """
        if self.num_classes and not pre_logits:
            return self.logit_layer(self.avgpool(self.get_classifier()(x)).flatten(1))
        if "." in self.logits_name:
            for module in list(self.get_classifier().children())[:-1]:
                x = module(x)
        return self.avgpool(x).flatten(1) if self.global_pool else x

    def get_classifier(self) -> nn.Module:
        """What gives a logit at each position; the global average comes after it."""
        return getattr(self, self.logits_name.partition(".")[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last convolution with random weights in the place of the present one.

        The logits keep their temperature; their bias becomes the default for the new number of classes.

        Args:
            num_classes: K; 0 leaves that convolution out, and temperature and bias unused: the model then gives
                ``(N, head_hidden_size)``.
            global_pool: ``"avg"``; with 0 classes also ``""``, no average: ``(N, head_hidden_size, H', W')``. ``None``:
                as it is.

        Raises:
            ValueError: A negative number, or another ``global_pool``.
        """
        self.global_pool = resolve_pooling(num_classes, global_pool, self.global_pool)
        reference = next(self.parameters())
        new: nn.Module = nn.Identity()
        if num_classes:
            new = self.conv_layer(self.head_hidden_size, num_classes, kernel_size=1)
            for module in new.modules():
                if isinstance(module, nn.Conv2d):
                    self.init_conv(module)
        new.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.set_submodule(self.logits_name, new)
        if num_classes:
            self.logit_layer = make_logit_layer(num_classes, self.logit_layer.logit_temperature, None)
        self.num_classes = num_classes

    def init_conv(self, conv: nn.Conv2d) -> None:
        """Draw a convolution's initial weights."""
        raise NotImplementedError

    def init_convs(self) -> None:
        """Draw the initial weights of all convolutions, in the order of registration."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_conv(module)


def make_logit_layer(num_classes: int, logit_temperature: float | None, logit_bias: float | None) -> LogitLayer:
    """Temperature and bias; the bias is ``-log(K - 1)`` by default, with which a zero output means a probability 1/K.

    Raises:
        ValueError: ``num_classes`` below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least 1")
    if logit_bias is None:
        logit_bias = -math.log(num_classes - 1) if num_classes > 1 else 0.0
    return LogitLayer(logit_temperature=logit_temperature, logit_bias=logit_bias)


def resolve_norm(norm_layer: str | Layer) -> Layer:
    """A norm by name (:func:`bcos_train.nn.make_norm`) or as it is."""
    return make_norm(norm_layer) if isinstance(norm_layer, str) else norm_layer


def resolve_conv(conv_layer: Layer | None, b: float, max_out: int) -> Layer:
    """The given convolution, or the B-cos convolution with these options."""
    return partial(BcosConv2d, b=b, max_out=max_out) if conv_layer is None else conv_layer


def linear_drop_probs(last: float, n: int) -> Iterator[float]:
    """The drop probabilities of ``n`` blocks: a straight line, as in arXiv 1603.09382, but from 0 for the first.

    Raises:
        ValueError: ``last`` outside [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"stochastic_depth_prob={last}: at least 0 and less than 1")
    return iter([last * i / max(n - 1, 1) for i in range(n)])
