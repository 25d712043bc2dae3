"""Attribution maps that a loss can be differentiated through, with the logits of the same forward pass.

Axes: N images, C channels of the input or of a feature map, H W pixels, h w positions of a feature map, K classes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bcos_train.explanation.hooks import forward_hooks
from bcos_train.explanation.mode import explanation_graph, is_explainable
from bcos_train.utils.suggestions import join_words, suggest

__all__ = ["STAGES", "Attribution", "attribution_maps", "find_layer"]

#: ``"bcos"``: W(x) times the input or the features, summed over channels. ``"ixg"``: the same with the ordinary
#: gradient. ``"grad_cam"``: the positive part of the features weighted by the mean gradient of their channel.
Attribution = Literal["bcos", "ixg", "grad_cam"]
#: Names of the outputs of a ResNet's stages; ``"final"`` is the last one.
STAGES = ("mid1", "mid2", "mid3", "final")


def attribution_maps(
    model: nn.Module, x: Tensor, target: Tensor | int | None, method: Attribution = "bcos", layer: str = "input"
) -> tuple[Tensor, Tensor]:
    """Explain one class per image, differentiably with respect to the parameters.

    The logits have the gradients of an ordinary forward pass, and the maps exact ones: for ``"bcos"`` the dynamic
    scales, of which W(x) is made, keep their history (:func:`~bcos_train.explanation.explanation_graph`). Running
    statistics are updated once in training mode.

    Args:
        model: Maps (N, C, H, W) to logits (N, K).
        x: (N, C, H, W).
        target: (N,) int64 classes, on the device of ``x``, or one for all; the range of a tensor is not checked, which
            would wait for the device. ``None``: the predicted ones.
        method: See :data:`Attribution`.
        layer: ``"input"``, or a layer for :func:`find_layer`, whose output is (N, C, h, w).

    Returns:
        The logits (N, K) and the maps (N, h, w), in units of the logit; (N, H, W) at the input.

    Raises:
        ValueError: There is no such method or layer, ``method`` doesn't suit the network or the layer, ``target`` has
            another shape, the layer's output is not (N, C, h, w), it was not used exactly once, or as for
            :func:`~bcos_train.explanation.explanation_graph`.
    """
    if method not in (known := get_args(Attribution)):
        raise ValueError(f"method={method!r}: {join_words(known)}{suggest(method, known)}")
    if method == "bcos" and not is_explainable(model):
        raise ValueError(f"method='bcos': {type(model).__name__} is no B-cos network; use ixg or grad_cam")
    if method == "grad_cam" and layer == "input":
        raise ValueError("method='grad_cam' explains features, not the input; use layer='final' or a module's path")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(layer == "input")
        with explanation_graph(model) as bcos_gradient, _recorded(model, layer) as outputs:
            logits = model(leaf)
        at = leaf if layer == "input" else _single_map(outputs, layer)
        classes = _classes(logits, target)
        selected = logits.gather(1, classes[:, None]).sum()
        if method == "bcos":
            gradient = bcos_gradient(selected, at)
        else:
            (gradient,) = torch.autograd.grad(selected, at, create_graph=True)
        if method == "grad_cam":
            return logits, (gradient.mean((2, 3), keepdim=True) * at).sum(1).relu()
        return logits, (gradient * at).sum(1)


def _classes(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """Return the classes to explain, (N,) int64."""
    if target is None:
        return logits.detach().argmax(1)
    if isinstance(target, int):
        if not 0 <= target < logits.shape[1]:
            raise ValueError(f"{target=}: the model has the classes 0 to {logits.shape[1] - 1}")
        return logits.new_full((len(logits),), target, dtype=torch.int64)
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be ({len(logits)},) int64, not {tuple(target.shape)} {target.dtype}")
    return target


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """Return the module called ``layer``.

    Args:
        layer: Path of a module, such as ``"layer3"`` or ``"features.4"``; or one of :data:`STAGES` for a model with the
            children ``layer1``, ``layer2``, …, as ResNets have.

    Raises:
        ValueError: There is none.
    """
    stages = [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]
    names = dict(zip(STAGES, stages[:-1], strict=False)) | ({"final": stages[-1]} if stages else {})
    modules = dict(model.named_modules())
    del modules[""]
    if (module := modules.get(names.get(layer, layer))) is None:
        allowed = ["input", *names, *(name for name in modules if "." not in name)]
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}; there are {', '.join(allowed)}")
    return module


@contextmanager
def _recorded(model: nn.Module, layer: str) -> Iterator[list[object]]:
    """Yield a list, to which each call of the layer within the block adds its output."""
    outputs: list[object] = []

    def record(module: nn.Module, args: object, kwargs: object, output: Any) -> Tensor | None:
        if isinstance(output, Tensor):
            # Frozen layers have no graph.
            output = output if output.requires_grad else output.detach().requires_grad_()
        outputs.append(output)
        # A copy, so that a later in-place operation does not modify what was recorded.
        return output.clone() if isinstance(output, Tensor) else None

    with forward_hooks([] if layer == "input" else [find_layer(model, layer)], record):
        yield outputs


def _single_map(outputs: list[object], layer: str) -> Tensor:
    if len(outputs) != 1:
        raise ValueError(f"layer {layer!r} is called {len(outputs)} times in a forward pass, not once")
    if not isinstance(outputs[0], Tensor) or outputs[0].ndim != 4:
        shape = tuple(outputs[0].shape) if isinstance(outputs[0], Tensor) else type(outputs[0]).__name__
        raise ValueError(f"the output of layer {layer!r} is {shape}; a map needs feature maps (N, C, h, w)")
    return outputs[0]
