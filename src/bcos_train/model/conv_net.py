"""Base class of the convolutional B-cos networks.

The classifier is a convolution with a logit at each position, followed by the global average (Böhle et al., TPAMI 2024,
arXiv 2306.10898, sec. 4). So all positions pass through the same linear map, and images of any size can be classified.

Axes: N images, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.dataset.encoding import BcosEncoding
from bcos_train.model.base import BcosModel, check_images, resolve_pooling
from bcos_train.model.intermediates import (
    Intermediates,
    check_output_format,
    last_of_each_resolution,
    run_and_collect,
    take_indices,
)
from bcos_train.model.transform import InferenceTransform
from bcos_train.nn import BcosConv2d, LogitLayer, make_norm

__all__ = [
    "CIFAR_OPTIONS",
    "LONG_RECIPE_TRANSFORM",
    "NO_RESIZE_TRANSFORM",
    "BcosConvNet",
    "LayerFactory",
    "linear_drop_probs",
    "make_logit_layer",
    "resolve_conv",
    "resolve_norm",
]

#: Builds a norm from the number of channels, or a convolution with the arguments of :class:`~bcos_train.nn.BcosConv2d`.
LayerFactory = Callable[..., nn.Module]

#: Transform of networks for small images, without resizing and cropping.
NO_RESIZE_TRANSFORM = InferenceTransform(None, 224, BcosEncoding())
#: Transform of the published networks of the long recipe (``bcos_final_long``), evaluated with a tighter crop.
LONG_RECIPE_TRANSFORM = InferenceTransform(232, 224, BcosEncoding())

#: Options of the CIFAR-10 networks of the norm study: MaxOut over two units, as in ``norm_ablations_final``.
CIFAR_OPTIONS = {"num_classes": 10, "small_inputs": True, "max_out": 2}


class BcosConvNet(BcosModel):
    """Convolutional network: features ``(N, C, H', W')``, classifier at each position, global average, logit layer.

    Subclasses set the attributes below and define ``get_feature_extractor`` and ``init_conv``.
    """

    #: Path of the convolution that computes the logits. With a dot, it is the last module of the classifier, an
    #: ``nn.Sequential``.
    logit_conv_name: str = "classifier"
    #: Minimum height and width of an image in pixels, so that the feature map is not empty.
    min_size: int = 1
    logit_layer: LogitLayer
    conv_layer: LayerFactory

    def average(self, x: Tensor) -> Tensor:
        """Average over positions, by the child ``avgpool`` in networks whose official counterparts have that child."""
        pool = getattr(self, "avgpool", None)
        return (F.adaptive_avg_pool2d(x, 1) if pool is None else pool(x)).flatten(1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map before the classifier: ``(N, in_chans, H, W) -> (N, num_features, H', W')``.

        Raises:
            ValueError: The number of axes or channels is wrong, or H or W is below ``min_size``.
        """
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        return self.get_feature_extractor()(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Intermediates:
        """Compute feature maps as timm's models do: the last one of each resolution, like ``features_only=True``.

        Args:
            x: As for ``forward_features``.
            indices: Indices of the feature maps; an integer: the last so many; ``None``: all.
            norm: No effect, as in timm's ResNet: there is no norm that fits all of them.
            stop_early: Skip what follows the last of these feature maps.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the feature maps alone.

        Returns:
            The output of ``forward_features`` (with ``stop_early`` the last feature map) and a list of feature maps
            (N, C, H', W').

        Raises:
            ValueError: As for ``forward_features``, or ``indices`` or ``output_fmt`` is another value.
        """
        check_images(x, self.in_chans, self.min_size, type(self).__name__)
        check_output_format(output_fmt, ["NCHW"])
        modules = list(self.get_feature_extractor().children())
        ends = last_of_each_resolution(modules)
        taps = [ends[index] for index in take_indices(len(ends), indices)]
        x, features = run_and_collect(modules, x, taps, stop_early)
        return features if intermediates_only else (x, features)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits ``(N, K)``, or ``(N, head_hidden_size)`` with ``pre_logits``, from the feature map.

        Without average (``global_pool=""``) the latter is ``(N, head_hidden_size, H', W')``.
        """
        if self.num_classes and not pre_logits:
            return self.logit_layer(self.average(self.get_classifier()(x)))
        if "." in self.logit_conv_name:
            for module in list(self.get_classifier().children())[:-1]:
                x = module(x)
        return self.average(x) if self.global_pool else x

    def get_classifier(self) -> nn.Module:
        """Return the module that computes logits at each position, before the global average."""
        return getattr(self, self.logit_conv_name.partition(".")[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last convolution by a new one with random weights.

        The logit temperature is unchanged; the logit bias becomes the default for the new number of classes.

        Args:
            num_classes: K; 0 removes the convolution and doesn't apply temperature and bias: the model then returns
                ``(N, head_hidden_size)``.
            global_pool: ``"avg"``; with 0 classes also ``""``, no average: ``(N, head_hidden_size, H', W')``. ``None``:
                unchanged.

        Raises:
            ValueError: ``num_classes`` is negative, or ``global_pool`` is another value.
        """
        self.global_pool = resolve_pooling(num_classes, global_pool, self.global_pool)
        reference = next(self.parameters())
        logit_conv: nn.Module = nn.Identity()
        if num_classes:
            logit_conv = self.conv_layer(self.head_hidden_size, num_classes, kernel_size=1)
            for module in logit_conv.modules():
                if isinstance(module, nn.Conv2d):
                    self.init_conv(module)
        logit_conv.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.set_submodule(self.logit_conv_name, logit_conv)
        if num_classes:
            self.logit_layer = make_logit_layer(num_classes, self.logit_layer.logit_temperature, None)
        self.num_classes = num_classes

    def init_conv(self, conv: nn.Conv2d) -> None:
        """Initialize the weights of a convolution."""
        raise NotImplementedError

    def init_convs(self) -> None:
        """Initialize the weights of all convolutions, in the order of registration."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.init_conv(module)


def make_logit_layer(num_classes: int, logit_temperature: float | None, logit_bias: float | None) -> LogitLayer:
    """Build the logit layer; the default bias ``-log(K - 1)`` maps a zero output to the probability 1/K.

    Raises:
        ValueError: ``num_classes`` is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least 1")
    if logit_bias is None:
        logit_bias = -math.log(num_classes - 1) if num_classes > 1 else 0.0
    return LogitLayer(logit_temperature=logit_temperature, logit_bias=logit_bias)


def resolve_norm(norm_layer: str | LayerFactory) -> LayerFactory:
    """Return the norm factory of that name (see :func:`bcos_train.nn.make_norm`); factories are returned unchanged."""
    return make_norm(norm_layer) if isinstance(norm_layer, str) else norm_layer


def resolve_conv(conv_layer: LayerFactory | None, b: float, max_out: int) -> LayerFactory:
    """Return ``conv_layer``, or by default a factory of B-cos convolutions with these options."""
    return partial(BcosConv2d, b=b, max_out=max_out) if conv_layer is None else conv_layer


def linear_drop_probs(last: float, n: int) -> Iterator[float]:
    """Return drop probabilities of ``n`` blocks that increase linearly, as in arXiv 1603.09382, but from 0.

    Raises:
        ValueError: ``last`` is outside [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"stochastic_depth_prob={last}: at least 0 and less than 1")
    return iter([last * i / max(n - 1, 1) for i in range(n)])
