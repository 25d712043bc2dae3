"""What the convolutional B-cos networks share.

Their classifier is a convolution that gives a logit at each position; the global average comes after it (Böhle et al.,
TPAMI 2024, arXiv 2306.10898, sec. 4). So every position's contribution to a logit passes through one and the same
linear map, and images of any size can be classified.

Axes: N images, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from bcos_train.model.base import BcosModel
from bcos_train.nn import BcosConv2d, LogitLayer, make_norm

__all__ = ["BcosConvNet", "Layer", "linear_drop_probs", "make_logit_layer", "resolve_conv", "resolve_norm"]

#: A norm is called with the number of channels, a convolution as :class:`~bcos_train.nn.BcosConv2d` is.
Layer = Callable[..., nn.Module]


class BcosConvNet(BcosModel):
    """Features ``(N, C, H', W')``, a classifier at each position, the global average, temperature and bias.

    Subclasses register the classifier, a convolution or an ``nn.Sequential`` that ends in one, under
    :attr:`classifier_name`, set the attributes below and define ``get_feature_extractor``, ``forward_features`` and
    ``init_conv``.
    """

    classifier_name: str = "classifier"
    logit_layer: nn.Module
    conv_layer: Layer

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map ``(N, num_features, H', W') -> (N, K)``, or ``(N, head_hidden_size)`` with ``pre_logits``."""
        before, last = self._split_classifier()
        x = before(x)
        if not pre_logits:
            x = last(x)
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.logit_layer(x)

    def get_classifier(self) -> nn.Module:
        """What gives a logit at each position; the global average comes after it."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: at least 0")
        reference = next(self.parameters())
        new: nn.Module = nn.Identity()
        if num_classes:
            new = self.conv_layer(self.head_hidden_size, num_classes, kernel_size=1)
            self.init_conv(next(m for m in new.modules() if isinstance(m, nn.Conv2d)))
        new.to(device=reference.device, dtype=reference.dtype).train(self.training)
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Sequential):
            classifier[-1] = new
        else:
            setattr(self, self.classifier_name, new)
        self.logit_layer = make_logit_layer(num_classes, None, None) if num_classes else nn.Identity()
        self.num_classes = num_classes

    def init_conv(self, conv: nn.Conv2d) -> None:
        """Draw a convolution's initial weights."""
        raise NotImplementedError

    def _split_classifier(self) -> tuple[nn.Module, nn.Module]:
        """What comes before the convolution that gives the logits, and that convolution."""
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Sequential):
            return classifier[:-1], classifier[-1]
        return nn.Identity(), classifier


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
