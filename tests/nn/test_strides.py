"""Memory layout of outputs: code written for the official modules calls ``view`` on them."""

import bcos.modules as official
import pytest
import torch
from bcos.modules.norms import centered_norms, uncentered_norms
from torch import nn

from bcos_train import nn as ours

NORMS = [name for name in ours.__all__ if hasattr(centered_norms, name) or hasattr(uncentered_norms, name)]
LAYERS = {
    "conv": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3}),
    "conv MaxOut": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "max_out": 2}),
    "conv B=1.25": ("BcosConv2d", {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "b": 1.25}),
    "linear MaxOut": ("BcosLinear", {"in_features": 5, "out_features": 8, "max_out": 2}),
    **{name: (name, {}) for name in NORMS},
}


def build(package: object, name: str, options: dict[str, object]) -> nn.Module:
    kind = next(
        getattr(module, name)
        for module in (package, centered_norms, uncentered_norms)
        if module is not None and hasattr(module, name)
    )
    if options:
        return kind(**options)
    return kind(5) if name == "DetachableLayerNorm" else kind(*(2, 8) if "Group" in name else (8,))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_strides_for_contiguous_input_are_the_official_ones(layer: str, detach: bool) -> None:
    """Also of a centered position norm, which returns channels-last tensors in both, except in explanation mode."""
    x = torch.randn(2, 8, 4, 5)
    strides = []
    for package in (ours, official):
        module = build(package, *LAYERS[layer]).eval()
        module.set_explanation_mode(detach)  # type: ignore[operator]
        strides.append(module(x).stride())
    assert strides[0] == strides[1]
