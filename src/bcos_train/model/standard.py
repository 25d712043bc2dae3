"""Networks of torchvision, as baselines for B-cos networks. Their input is standardized RGB.

Parameter names, initial weights and outputs are torchvision's, so its weights load unchanged. They have the interface
of the B-cos models: separate features and head, inference transform, replaceable classifier.

Axes: N images, C channels, H height, W width, K classes.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision import models

from bcos_train.dataset.encoding import Standardize
from bcos_train.model.base import check_images, resolve_pooling
from bcos_train.model.registry import Builder, register_model
from bcos_train.model.transform import InferenceTransform

__all__ = ["StandardModel"]


class StandardModel(nn.Module):
    """Network of torchvision as ``forward_head(forward_features(x))``.

    Args:
        network: Its children become children of this module with the same names; one of them is ``avgpool``.
        features: Names of the children that compute the features, in the order of application.
        classifier: Name of the child after the pooling: the linear layer, or an ``nn.Sequential`` that ends with it.
        num_features: Channels of the features; ``None``: input features of the linear layer.
        min_size: Minimum height and width of an image in pixels, so that the feature map is not empty.

    Shape: ``(N, 3, H, W) -> (N, K)``, H and W at least ``min_size``.
    """

    transform = InferenceTransform(256, 224, Standardize())
    in_chans = 3
    avgpool: nn.Module

    def __init__(
        self,
        network: nn.Module,
        features: Sequence[str],
        classifier: str,
        num_features: int | None = None,
        min_size: int = 1,
    ) -> None:
        super().__init__()
        self.architecture = type(network).__name__
        self.min_size = min_size
        for name, child in network.named_children():
            self.add_module(name, child)
        self.feature_names = tuple(features)
        self.classifier_name = classifier
        linear = self._split_classifier()[1]
        assert isinstance(linear, nn.Linear)
        self.num_classes = linear.out_features
        #: Channels of the output of ``forward_features``, and input features of the linear layer.
        self.num_features = linear.in_features if num_features is None else num_features
        self.head_hidden_size = linear.in_features

    @staticmethod
    def to_probabilities(logits: Tensor) -> Tensor:
        """Map logits to probabilities ``(N, K)``, for the cross-entropy that standard models are trained with."""
        return logits.softmax(-1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map: ``(N, 3, H, W) -> (N, num_features, H', W')``.

        Raises:
            ValueError: The number of axes or channels is wrong, or H or W is below ``min_size``.
        """
        check_images(x, self.in_chans, self.min_size, self.architecture)
        for name in self.feature_names:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits ``(N, K)``, or ``(N, head_hidden_size)`` with ``pre_logits``, from the feature map."""
        head, linear = self._split_classifier()
        x = self.avgpool(x)
        # ConvNeXt's classifier starts with a norm of feature maps and flattens its output itself.
        if not any(isinstance(module, nn.Flatten) for module in head):
            x = x.flatten(1)
        x = head(x)
        return x if pre_logits else linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the module that computes logits from the pooled features."""
        return getattr(self, self.classifier_name)

    def get_feature_extractor(self) -> nn.Sequential:
        """Return a module that computes ``forward_features`` and shares its parameters with this model."""
        return nn.Sequential(*(getattr(self, name) for name in self.feature_names))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new one with random weights, in PyTorch's default initialization.

        Args:
            num_classes: K; 0 removes the layer: the model then returns ``(N, head_hidden_size)``.
            global_pool: ``"avg"`` or ``None``, the only pooling of torchvision's networks.

        Raises:
            ValueError: ``num_classes`` is negative, or ``global_pool`` is another value.
        """
        if resolve_pooling(num_classes, global_pool) != "avg":
            raise ValueError(f"global_pool={global_pool!r}: torchvision's {self.architecture} only takes 'avg'")
        reference = next(self.parameters())
        linear = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        linear.to(device=reference.device, dtype=reference.dtype).train(self.training)
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Sequential):
            classifier[-1] = linear
        else:
            setattr(self, self.classifier_name, linear)
        self.num_classes = num_classes

    def _split_classifier(self) -> tuple[nn.Sequential, nn.Module]:
        """Return the modules before the linear layer, and the linear layer."""
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Sequential):
            return classifier[:-1], classifier[-1]
        return nn.Sequential(), classifier


def _build(builder: Builder, num_classes: int, **options: float) -> nn.Module:
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least 1")
    return builder(weights=None, num_classes=num_classes, **options)


def _resnet(builder: Builder, /, *, num_classes: int = 1000, zero_init_residual: bool = False) -> StandardModel:
    network = _build(builder, num_classes, zero_init_residual=zero_init_residual)
    features = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return StandardModel(network, features, "fc")


def _densenet(builder: Builder, /, *, num_classes: int = 1000, drop_rate: float = 0.0) -> StandardModel:
    network = _build(builder, num_classes, drop_rate=drop_rate)
    # Functional in torchvision.
    network.relu, network.avgpool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
    return StandardModel(network, ("features", "relu"), "classifier", min_size=29)


def _vgg(builder: Builder, /, *, num_classes: int = 1000, dropout: float = 0.5) -> StandardModel:
    network = _build(builder, num_classes, dropout=dropout)
    return StandardModel(network, ("features",), "classifier", num_features=512, min_size=32)


def _convnext(
    builder: Builder, /, *, num_classes: int = 1000, stochastic_depth_prob: float | None = None
) -> StandardModel:
    # Without it, torchvision's default of each size.
    options = {} if stochastic_depth_prob is None else {"stochastic_depth_prob": stochastic_depth_prob}
    return StandardModel(_build(builder, num_classes, **options), ("features",), "classifier", min_size=32)


_FAMILIES: dict[Callable[..., StandardModel], Sequence[str]] = {
    _resnet: ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    _densenet: ("densenet121", "densenet161", "densenet169", "densenet201"),
    _vgg: tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    _convnext: ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
}

for _family, _names in _FAMILIES.items():
    for _name in _names:
        register_model(f"standard_{_name}", partial(_family, getattr(models, _name)))
