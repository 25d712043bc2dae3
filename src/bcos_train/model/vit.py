"""SimpleViT and ViT-C, as B-cos networks and as standard networks.

The transformer is that of Beyer et al. 2022 (arXiv 2205.01580): fixed sine-cosine positional embedding, no class token,
and a classifier on the average of the tokens. ViT-C replaces the 16x16 patches by a convolutional stem, at the cost of
one transformer block (Xiao et al. 2021, arXiv 2106.14881). In the B-cos networks the linear layers, convolutions and
the classifier are B-cos transforms, norms have no bias and there is no activation function. Queries, keys and values
come from an ordinary linear layer without bias, since attention already is a dynamic linear map: a matrix that depends
on the input, times the values (Böhle et al., TPAMI 2024, arXiv 2306.10898).
Parameter names, shapes and the order of random draws equal those of the official models.

Axes: N images, C channels, H height, W width, P patch size, T tokens, D token dimension, A attention heads, K classes.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bcos_train.dataset.encoding import Standardize
from bcos_train.model.base import BcosModel, GroupMatcher, check_images, resolve_pooling
from bcos_train.model.conv_net import LayerFactory, make_logit_layer
from bcos_train.model.grad_checkpointing import CheckpointedBlocks, set_grad_checkpointing
from bcos_train.model.intermediates import (
    Intermediates,
    IntermediatesDict,
    check_output_format,
    run_and_collect,
    take_indices,
)
from bcos_train.model.registry import Builder, register_model
from bcos_train.model.transform import InferenceTransform
from bcos_train.model.vit_parts import Attention, Encoder, Patches, PositionalEmbedding, conv_stem
from bcos_train.nn import (
    BcosConv2d,
    BcosLinear,
    DetachableGNLayerNorm2d,
    DetachableLayerNorm,
    LogitLayer,
    NoBias,
)

__all__ = ["Attention", "BcosSimpleViT", "PositionalEmbedding", "SimpleViT", "StandardSimpleViT"]


class SimpleViT(nn.Module):
    """SimpleViT or ViT-C with configurable layers; the defaults are standard layers and GELU.

    Args:
        num_classes, in_chans, patch_size, stem, dim, depth, heads, mlp_dim: As for :class:`BcosSimpleViT`.
        linear_layer, conv_layer: Factories with the arguments of ``nn.Linear`` and ``nn.Conv2d``.
        norm_layer, norm2d_layer: Norm factories for tokens and the stem's feature maps; their argument is the number of
            channels.
        act_layer: Activation factory without arguments.

    Shape: ``(N, in_chans, H, W) -> (N, K)``, H and W as for :class:`BcosSimpleViT`.

    Raises:
        ValueError: A size is out of range.
    """

    #: Names of the modules that compute the tokens, in the order of application.
    feature_names = ("to_patch_embedding", "positional_embedding", "transformer")

    #: ``"avg"``, or ``""`` after ``reset_classifier(0, "")``.
    global_pool: str = "avg"

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
        linear_layer: LayerFactory = nn.Linear,
        norm_layer: LayerFactory = nn.LayerNorm,
        act_layer: LayerFactory = nn.GELU,
        conv_layer: LayerFactory = nn.Conv2d,
        norm2d_layer: LayerFactory = DetachableGNLayerNorm2d,
    ) -> None:
        super().__init__()
        _check_sizes(num_classes, in_chans, patch_size, dim, depth, heads, mlp_dim)
        embedding: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_chans
        if stem:
            embedding["conv_stem"] = conv_stem(in_chans, stem, conv_layer, norm2d_layer, act_layer)
            channels = stem[-1]
        embedding["rearrage"] = Patches(patch_size)  # spelled as in the official code
        embedding["linear"] = linear_layer(channels * patch_size**2, dim)
        self.to_patch_embedding = nn.Sequential(embedding)
        self.positional_embedding = PositionalEmbedding()
        block = partial(Encoder, dim, heads, mlp_dim, linear_layer, norm_layer, act_layer)
        self.transformer = CheckpointedBlocks(OrderedDict((f"encoder_{i}", block()) for i in range(depth)))
        self.to_latent = nn.Identity()  # only so that the children are the official ones
        self.linear_head = nn.Sequential(OrderedDict(norm=norm_layer(dim), linear=linear_layer(dim, num_classes)))
        self.linear_layer = linear_layer
        self.patch_dim = channels * patch_size**2  # values of a patch
        self.num_features = self.head_hidden_size = dim
        self.num_classes = num_classes
        self.in_chans = in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the tokens after the transformer: ``(N, in_chans, H, W) -> (N, T, D)``."""
        check_images(x, self.in_chans, 1, type(self).__name__)
        for name in self.feature_names:
            x = getattr(self, name)(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates | IntermediatesDict:
        """Compute the tokens after each transformer block, as timm's ViT does.

        Args:
            x: As for ``forward_features``.
            indices: Indices of the blocks; an integer: the last so many; ``None``: all.
            return_prefix_tokens: Without effect: there are no class or register tokens.
            norm: Apply the head's norm to them.
            stop_early: Skip what follows the last of these blocks.
            output_fmt: ``"NCHW"``, (N, D, H', W'), or ``"NLC"``, (N, T, D).
            intermediates_only: Return the list alone.
            output_dict: Return a dictionary, with the features as ``image_features`` and the list as
                ``image_intermediates``.

        Returns:
            The output of ``forward_features`` (with ``stop_early`` that of the last block computed), and the list.

        Raises:
            ValueError: As for ``forward_features``, or ``indices`` or ``output_fmt`` is another value.
        """
        check_images(x, self.in_chans, 1, type(self).__name__)
        check_output_format(output_fmt, ["NCHW", "NLC"])
        blocks = [partial(self.transformer.run_block, [block]) for block in self.transformer]
        taps = take_indices(len(blocks), indices)
        x = self.to_patch_embedding(x)
        grid = x.shape[1:3]
        x, features = run_and_collect(blocks, self.positional_embedding(x), taps, stop_early)
        if norm:
            features = [self.linear_head[0](tokens) for tokens in features]
        if output_fmt == "NCHW":
            features = [tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for tokens in features]
        if output_dict:
            intermediates: IntermediatesDict = {"image_intermediates": features}
            return intermediates if intermediates_only else {**intermediates, "image_features": x}
        return features if intermediates_only else (x, features)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits ``(N, K)`` from tokens; with ``pre_logits`` the average after the head's norm, ``(N, D)``."""
        norm, linear = self.linear_head
        x = norm(self.to_latent(x.mean(dim=1) if self.global_pool else x))
        return x if pre_logits else linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Sequential:
        """Return the norm and linear layer that follow the average of the tokens."""
        return self.linear_head

    def get_feature_extractor(self) -> nn.Sequential:
        """Return the modules that compute the tokens ``(N, T, D)``, shared with this model."""
        return nn.Sequential(OrderedDict((name, getattr(self, name)) for name in self.feature_names))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new one with random weights; the head's norm is unchanged.

        Args:
            num_classes: K; 0 removes the linear layer: the model then returns ``(N, D)``.
            global_pool: ``"avg"``, the average of the tokens; with 0 classes also ``""``: the model then returns each
                token after the head's norm, ``(N, T, D)``. ``None``: unchanged.

        Raises:
            ValueError: ``num_classes`` is negative, or ``global_pool`` is another value.
        """
        self.global_pool = resolve_pooling(num_classes, global_pool, self.global_pool)
        reference = next(self.parameters())
        linear = self.linear_layer(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        linear.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.linear_head.linear = linear
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, as for :class:`~bcos_train.model.BcosModel`."""
        set_grad_checkpointing(self, enable)

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group the embedding, each block, and the head; there are no stages for ``coarse``."""
        return {"stem": r"to_patch_embedding\.", "blocks": r"transformer\.encoder_(\d+)\."}


class StandardSimpleViT(SimpleViT):
    """Baseline of the B-cos network, for standardized RGB.

    It is not a :class:`~bcos_train.model.BcosModel`, since it has no dynamic linear weights, but its other methods are
    the same.
    """

    transform = InferenceTransform(256, 224, Standardize())
    #: Map from logits to probabilities, for the cross-entropy that these networks are trained with.
    to_probabilities = staticmethod(partial(torch.softmax, dim=-1))


class BcosSimpleViT(BcosModel):
    """B-cos SimpleViT or ViT-C: ``model[0]`` is the network, ``model[1]`` the logit layer.

    Args:
        num_classes: K.
        in_chans: C; 6 for the encoding ``[r, g, b, 1-r, 1-g, 1-b]``.
        b: Exponent B of the B-cos transform (arXiv 2205.10268, eq. 3), at least 1.
        max_out: Units per output channel; the output is their maximum.
        logit_bias: Added to every logit. Default: ``-log(K - 1)``, which maps a zero output to the probability 1/K.
        logit_temperature: Divides every logit before the bias is added.
        patch_size: P, in pixels of the image or, with a stem, of the stem's output.
        stem: Channels of the stem's 3x3 convolutions; the stride is 2 wherever they increase. Empty: no stem.
        dim: D, a multiple of 4 and of ``heads``.
        depth: Transformer blocks.
        heads: A.
        mlp_dim: Hidden units of the feed-forward networks.

    Shape: ``(N, in_chans, H, W) -> (N, K)``. H and W are multiples of P; with a stem and P = 1, any size. The four
    strides of the published stems divide H and W by 16, rounded up.

    Raises:
        ValueError: A value is out of range.
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
        # The official model is a sequence of the two; these are its state-dict keys.
        self.add_module("0", network)
        self.add_module("1", make_logit_layer(num_classes, logit_temperature, logit_bias))
        self.num_features, self.head_hidden_size = network.num_features, network.head_hidden_size
        self.num_classes = num_classes
        self.in_chans = in_chans

    # The official model is an `nn.Sequential`.
    def __getitem__(self, index: int | slice) -> Any:
        modules = list(self.children())[index]
        return nn.Sequential(*modules) if isinstance(modules, list) else modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    @property
    def logit_layer(self) -> LogitLayer:
        return self[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the tokens after the transformer: ``(N, in_chans, H, W) -> (N, T, D)``."""
        return self[0].forward_features(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates | IntermediatesDict:
        """See :meth:`SimpleViT.forward_intermediates`."""
        return self[0].forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits ``(N, K)`` from tokens; with ``pre_logits`` the average after the head's norm, ``(N, D)``."""
        x = self[0].forward_head(x, pre_logits)
        return self.logit_layer(x) if self.num_classes and not pre_logits else x

    def get_classifier(self) -> nn.Sequential:
        """Return the norm and B-cos linear layer between the average of the tokens and the logit layer."""
        return self[0].get_classifier()

    def get_feature_extractor(self) -> nn.Sequential:
        """Return the modules that compute the tokens ``(N, T, D)``, shared with this model."""
        return self[0].get_feature_extractor()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self[0].reset_classifier(num_classes, global_pool)
        self.global_pool = self[0].global_pool
        if num_classes:
            self.add_module("1", make_logit_layer(num_classes, self.logit_layer.logit_temperature, None))
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> GroupMatcher:
        """Group as :class:`SimpleViT` does, with the prefix ``0.`` of the names."""
        return {group: rf"0\.{pattern}" for group, pattern in self[0].group_matcher(coarse).items()}


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


#: By size: D, blocks of the SimpleViT (ViT-C: one fewer), heads, and the stem of the ViT-C.
_SIZES = {
    "ti": (192, 12, 3, (24, 48, 96, 192)),
    "s": (384, 12, 6, (48, 96, 192, 384)),
    "b": (768, 12, 12, (64, 128, 128, 256, 256, 512)),
    "l": (1024, 14, 16, (64, 128, 128, 256, 256, 512)),
}

_NETWORKS: dict[str, Builder] = {"": BcosSimpleViT, "standard_": StandardSimpleViT}

for _prefix, _network in _NETWORKS.items():
    for _size, (_dim, _depth, _heads, _) in _SIZES.items():
        _options = {"dim": _dim, "depth": _depth, "heads": _heads, "mlp_dim": 4 * _dim}
        register_model(f"{_prefix}simple_vit_{_size}_patch16_224", partial(_network, **_options))
    for _size, (_dim, _depth, _heads, _stem) in _SIZES.items():
        _options = {"dim": _dim, "depth": _depth - 1, "heads": _heads, "mlp_dim": 4 * _dim}
        register_model(f"{_prefix}vitc_{_size}_patch1_14", partial(_network, patch_size=1, stem=_stem, **_options))
