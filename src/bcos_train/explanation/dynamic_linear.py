"""Dynamic linear weights W(x) and contribution maps.

A B-cos network is affine in its input once the dynamic scalings are frozen: logit_k(x) = W_k(x) x + c_k(x), where W(x)
is the product of all its layers' dynamic weights and c(x) gathers what does not come from the input (the logit bias,
biases of norm layers). In explanation mode the gradient of a logit is W(x) exactly. Source: Böhle et al., "B-cos
Networks: Alignment is All We Need for Interpretability" (CVPR 2022), eq. 11-13.

Axes: N images, C encoded colour channels (6), H, W pixels, K classes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from bcos_train.explanation.mode import explanation_mode
from bcos_train.explanation.precision import without_tf32
from bcos_train.nn import (
    AllNormUncentered2d,
    BatchNormUncentered2d,
    DetachableLayerNorm,
    Linear,
    NormedConv2d,
    NormedLinear,
    cached_weights,
    live_weights,
)

__all__ = ["Explanation", "constant_term", "dynamic_linear_weights", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What the network computed for a batch, and why. Floating-point fields have the dtype of the input.

    Attributes:
        logits: (N, K).
        prediction: (N,) int64, the class of the largest logit.
        target: (N,) int64, the class that is explained.
        weights: (N, C, H, W), W(x) of the target's logit.
        contribution_map: (N, H, W), sum over channels of x * W(x), in units of the logit. Its sum over a map is the
            logit less its constant term (:func:`constant_term`).
    """

    logits: Tensor
    prediction: Tensor
    target: Tensor
    weights: Tensor
    contribution_map: Tensor


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, *, create_graph: bool = False
) -> Explanation:
    """Explain one class per image of a batch, with one forward and one backward pass for all of them.

    Nothing outside is touched: not ``x`` (neither its ``requires_grad`` nor its ``grad``), not the gradients of the
    parameters, not the state of the model. On CUDA no factor is rounded to TF32. Works within ``torch.no_grad``,
    ``torch.inference_mode`` and autocast. A model wrapped in DDP is unwrapped: no communication takes place.

    Args:
        model: maps (N, C, H, W) to logits (N, K), each image on its own (batch norms in evaluation mode).
        x: (N, C, H, W), floating point; for B-cos networks in [0, 1] and encoded as [r, g, b, 1-r, 1-g, 1-b].
        target: the classes to explain, in 0 ... K-1: (N,) integers, one for all, or None for each image's prediction.
        create_graph: as for :func:`dynamic_linear_weights`. Without it the results are detached.

    Raises:
        ValueError: ``x`` is not a floating-point (N, C, H, W); the model does not return (N, K); ``target`` has another
            shape, is not an integer or is out of range.

    Warns:
        UserWarning: the model is in training mode, where batch norms scale by the statistics of the batch, so W(x)
            depends on the other images. Running statistics stay as they were in any case.
    """
    if model.training and not create_graph:
        warnings.warn(
            "explain() on a model in training mode: W(x) is that of the batch statistics and of this draw of the "
            "dropout. Call model.eval() first for the explanations of inference.",
            stacklevel=2,
        )
    weights, classes, logits = dynamic_linear_weights(model, x, target, create_graph=create_graph)
    image = x.clone() if x.is_inference() else x.detach()  # autograd can't save inference tensors
    return Explanation(
        logits=logits.to(x.dtype),
        prediction=logits.detach().argmax(1),
        target=classes,
        weights=weights,
        contribution_map=(image * weights).sum(1),
    )


def dynamic_linear_weights(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute W(x) of one class per image: the gradient of its logit in explanation mode.

    The core of :func:`explain`, for losses and methods that need the weights alone; the same rules hold.

    Args:
        model, x, target: As for :func:`explain`.
        create_graph: Keep the graph from the parameters to the results, for losses on explanations. The dynamic scales
            are constants in that graph.

    Returns:
        The weights (N, C, H, W), the explained classes (N,) int64, and the logits (N, K); detached without
        ``create_graph``.

    Raises:
        ValueError: As :func:`explain`.
    """
    _check_input(x)
    network = _unwrap(model)
    # With a graph, gradients reach the parameters through W(x): cached weights have none.
    weight_mode = live_weights() if create_graph else cached_weights(network)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_tf32(),
        weight_mode,
        explanation_mode(network),
        _frozen_buffers(network),
    ):
        leaf = x.detach().clone().requires_grad_()
        logits = _checked_logits(network(leaf), len(x))
        classes = logits.detach().argmax(1) if target is None else _as_indices(target, logits)
        selected = logits.gather(1, classes[:, None]).sum()
        (weights,) = torch.autograd.grad(selected, leaf, create_graph=create_graph)
    return weights, classes, logits if create_graph else logits.detach()


def constant_term(model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
    """The part of the target's logit that does not come from the input: c(x) in logit(x) = W(x) x + c(x).

    Found without looking at the logit's value, so that completeness can be checked against it: what a module answers
    to a zero input (a bias, the shift of a centered batch norm, a positional embedding, the logit bias) is its own
    constant, and the gradient of the logit at the module's output says how much of it arrives. This is the
    bias part of FullGrad (Srinivas & Fleuret, NeurIPS 2019, arXiv 1905.00780) on the frozen network. Constants that
    no module adds by itself (a parameter added in a parent's ``forward``) are not seen.

    Costs little more than one forward and backward pass for the whole batch: meant for checks and metrics, not for the
    training step. A module whose output has no axis for the images (an embedding that the parent adds) takes one more
    backward pass for each image.

    Args:
        model: as for :func:`explain`, in evaluation mode. Modules keep the images along the first axis.
        x: (N, C, H, W).
        target: as for :func:`explain`.

    Returns:
        (N,), dtype of ``x``, in units of the logit.

    Raises:
        ValueError: as :func:`explain`; the model is in training mode.
    """
    _check_input(x)
    network = _unwrap(model)
    if network.training:
        raise ValueError(
            "constant_term() needs a model in evaluation mode, got one in training mode: call model.eval()"
        )
    n_images = len(x)
    constants: list[_Constant] = []
    leaves = [module for module in network.modules() if not any(True for _ in module.children())]
    leaves = [module for module in leaves if not _is_zero_at_zero(module)]
    with torch.inference_mode(False), torch.enable_grad(), without_tf32(), explanation_mode(network):
        handles = [module.register_forward_hook(partial(_record_constant, constants, n_images)) for module in leaves]
        try:
            logits = _checked_logits(network(x.detach().clone().requires_grad_()), n_images)
        finally:
            for handle in handles:
                handle.remove()
        indices = logits.detach().argmax(1) if target is None else _as_indices(target, logits)
        selected = logits.gather(1, indices[:, None])[:, 0]
        terms = x.new_zeros(n_images)
        shared = [constant for constant in constants if not constant.by_image]
        for constant, grad in _gradients(selected.sum(), [c for c in constants if c.by_image]):
            terms += (grad * constant.value).flatten(1).sum(1, dtype=x.dtype)
        for n in range(n_images) if shared else ():
            for constant, grad in _gradients(selected[n], shared):
                terms[n] += (grad * constant.value).sum(dtype=x.dtype)
    return terms


@dataclass(frozen=True)
class _Constant:
    """The output of a module in the graph, and its output for a zero input.

    ``by_image``: the first axis of the output is that of the images.
    """

    point: Tensor
    value: Tensor
    by_image: bool


def _gradients(output: Tensor, constants: list[_Constant]) -> list[tuple[_Constant, Tensor]]:
    """The gradients of a scalar at those points from which it comes."""
    if not constants or not output.requires_grad:
        return []
    points = [constant.point for constant in constants]
    grads = torch.autograd.grad(output, points, retain_graph=True, allow_unused=True)
    return [(constant, grad) for constant, grad in zip(constants, grads, strict=True) if grad is not None]


#: Types of modules that return zeros for zeros as long as they have no bias. Subclasses may do otherwise.
_LINEAR = {
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
    nn.Linear,
    StochasticDepth,
    NormedConv2d,
    NormedLinear,
    Linear,
    DetachableLayerNorm,
    BatchNormUncentered2d,
    AllNormUncentered2d,
}


def _is_zero_at_zero(module: nn.Module) -> bool:
    """True if the output for a zero input is known to be zero, so that it doesn't have to be computed."""
    return type(module) in _LINEAR and getattr(module, "bias", None) is None and "forward" not in vars(module)


def _record_constant(
    constants: list[_Constant], n_images: int, module: nn.Module, args: tuple[Any, ...], output: Any
) -> Tensor | None:
    """A forward hook that notes what a module adds by itself."""
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    # Only modules on the way from the image: a softmax over detached queries is a dynamic weight, not a constant.
    on_path = any(arg.requires_grad for arg in inputs)
    if not on_path or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    by_image = output.requires_grad and all(t.ndim > 0 and len(t) == n_images for t in (output, *inputs))
    # All images have the same constant, unless one of the inputs that are kept differs between them.
    rows = 1 if by_image and all(arg.requires_grad for arg in inputs) else None
    zeros = [torch.zeros_like(arg[:rows]) if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args]
    with torch.no_grad():
        value = module.forward(*zeros)
    point = output if output.requires_grad else output.detach().requires_grad_()
    constants.append(_Constant(point, value, by_image))
    # A copy goes on, so that `out += identity` further down does not turn `point` into the sum.
    return point.clone()


def _unwrap(model: nn.Module) -> nn.Module:
    """DDP would wait for gradients of parameters that an explanation never computes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_input(x: Tensor) -> None:
    if x.ndim != 4 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (N, C, H, W) with N >= 1, got {x.dtype} {tuple(x.shape)}")


def _checked_logits(output: Any, n_images: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return a tensor of logits (N, K), got {type(output).__name__}")
    if output.ndim != 2 or len(output) != n_images:
        raise ValueError(f"the model must return logits ({n_images}, K), got {tuple(output.shape)}")
    return output


def _as_indices(target: Tensor | int, logits: Tensor, n_images: int | None = None) -> Tensor:
    """The target as (N,) int64 on the device of the logits, checked against their number of classes."""
    n_images = len(logits) if n_images is None else n_images
    indices = torch.as_tensor(target, device=logits.device)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"target must be integer class indices, got {indices.dtype}")
    if indices.ndim == 0:
        indices = indices.expand(n_images)
    if indices.shape != (n_images,):
        raise ValueError(f"target must be an int or of shape ({n_images},), got shape {tuple(indices.shape)}")
    allowed = range(logits.shape[1])
    wrong = [i for i in indices.tolist() if i not in allowed]
    if wrong:
        raise ValueError(f"target {wrong[0]} is out of range, allowed are 0 to {allowed.stop - 1}")
    # A copy, for autograd cannot save a tensor made in inference mode.
    return indices.long().clone()


@contextmanager
def _frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode update copies of their running statistics.

    The copies are swapped in rather than the values copied back: autograd has saved the buffers that it met.
    """
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in model.modules():
            for name, buffer in module._buffers.items() if module.training else ():
                if buffer is not None:
                    swapped.append((module, name, buffer))
                    module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in swapped:
            module._buffers[name] = buffer
