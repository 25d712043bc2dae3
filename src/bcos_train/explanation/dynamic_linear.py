"""Dynamic linear weights W(x) and contribution maps.

For fixed dynamic scales, a B-cos network is affine in its input: logit_k(x) = W_k(x) x + c_k(x), where W(x) is the
product of all layers' dynamic weights, and c(x) collects all terms that don't depend on the input (the logit bias,
biases of norm layers). In explanation mode the gradient of a logit is exactly W(x). Source: Böhle et al., "B-cos
Networks: Alignment is All We Need for Interpretability" (CVPR 2022), eq. 11-13.

Axes: N images, C encoded color channels (6), H, W pixels, K classes.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from bcos_train.explanation.hooks import forward_hooks
from bcos_train.explanation.mode import explanation_graph, explanation_mode
from bcos_train.explanation.precision import without_tf32
from bcos_train.nn import (
    AllNormUncentered2d,
    BatchNormUncentered2d,
    DetachableLayerNorm,
    Linear,
    NormedConv2d,
    NormedLinear,
    cached_weights,
)

__all__ = ["Explanation", "constant_term", "dynamic_linear_weights", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Logits of a batch and their explanation. Floating-point fields have the dtype of the input.

    Attributes:
        logits: (N, K).
        prediction: (N,) int64, the class with the largest logit.
        target: (N,) int64, the explained class.
        weights: (N, C, H, W), W(x) of the target's logit.
        contribution_map: (N, H, W), sum over channels of x * W(x), in units of the logit. The sum of a map is the logit
            minus its constant term (:func:`constant_term`).
    """

    logits: Tensor
    prediction: Tensor
    target: Tensor
    weights: Tensor
    contribution_map: Tensor


def explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, *, create_graph: bool = False
) -> Explanation:
    """Explain one class per image, with one forward and one backward pass for the batch.

    Works within ``torch.no_grad``, ``torch.inference_mode`` and autocast. There are no side effects on ``x`` (neither
    ``requires_grad`` nor ``grad``) and the gradients of the parameters.

    Without ``create_graph`` there are none on the state of the model either. TF32 is disabled on CUDA. A model wrapped
    in DDP is unwrapped, so there is no communication. Other threads may use the model at the same time, but not train
    it while a model in training mode is explained: its buffers are replaced by copies meanwhile.

    Args:
        model: Maps (N, C, H, W) to logits (N, K), independently for each image (batch norms in evaluation mode).
        x: (N, C, H, W), floating point; for B-cos networks in [0, 1] and encoded as [r, g, b, 1-r, 1-g, 1-b].
        target: Classes to explain, in 0 ... K-1: (N,) integers, one for all, or None for each image's prediction.
        create_graph: Return results that are differentiable with respect to the parameters; see
            :func:`dynamic_linear_weights`. Otherwise they are detached.

    Raises:
        ValueError: ``x`` is not a floating-point (N, C, H, W); the model does not return (N, K); ``target`` has another
            shape, is not an integer or is out of range; or ``create_graph`` with a model that has modules of another
            package with an explanation mode of their own, or is an `nn.DataParallel`.

    Warns:
        UserWarning: The model is in training mode, where batch norms use the statistics of the batch, so W(x) depends
            on the other images.
    """
    if model.training and not create_graph:
        warnings.warn(
            "explain() on a model in training mode: W(x) depends on batch statistics and dropout. Call model.eval() "
            "first to explain the model's predictions at inference.",
            stacklevel=2,
        )
    logits, weights, classes = _explain(model, x, target, create_graph)
    image = x.clone() if x.is_inference() else x.detach()  # autograd can't save inference tensors
    return Explanation(
        logits=logits.to(x.dtype),
        prediction=logits.detach().argmax(1),
        target=classes,
        weights=weights,
        contribution_map=(image * weights).sum(1),
    )


def dynamic_linear_weights(
    model: nn.Module, x: Tensor, target: Tensor | int | None = None, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute W(x) of one class per image: the gradient of its logit in explanation mode.

    The core of :func:`explain`, for losses and methods that only need the weights.

    With ``create_graph`` the results are differentiable with respect to the parameters, for losses on logits and
    explanations. The forward pass is then an ordinary one, and the gradient of W(x) is exact: the dynamic scales, of
    which W(x) is made, keep their history (:func:`bcos_train.explanation.explanation_graph`). Without it there are no
    side effects, as for :func:`explain`.

    Args:
        model, x, target, create_graph: As for :func:`explain`.

    Returns:
        The logits (N, K) and the weights (N, C, H, W); detached without ``create_graph``.

    Raises:
        ValueError: As for :func:`explain`.
    """
    logits, weights, _ = _explain(model, x, target, create_graph)
    return logits, weights


def _explain(
    model: nn.Module, x: Tensor, target: Tensor | int | None, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (N, K), weights (N, C, H, W) and explained classes (N,) int64."""
    _check_input(x)
    network = model if create_graph else _unwrap(model)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        if create_graph:
            with explanation_graph(network) as gradient:
                logits, classes = _forward(network, leaf, target)
            return logits, gradient(_selected(logits, classes), leaf), classes
        with without_tf32(), cached_weights(network), explanation_mode(network), _frozen_buffers(network):
            logits, classes = _forward(network, leaf, target)
            (weights,) = torch.autograd.grad(_selected(logits, classes), leaf)
        return logits.detach(), weights, classes


def _forward(network: nn.Module, leaf: Tensor, target: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and explained classes (N,)."""
    logits = _check_logits(network(leaf), len(leaf))
    return logits, logits.detach().argmax(1) if target is None else _as_indices(target, logits)


def _selected(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).sum()


def constant_term(model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
    """Compute the part of the target's logit that does not depend on the input: c(x) in logit(x) = W(x) x + c(x).

    The computation does not use the value of the logit, so completeness can be checked against it. A module's constant
    is its output for a zero input (a bias, the shift of a centered batch norm, a positional embedding, the logit bias),
    and the gradient of the logit with respect to the module's output is its weight. This is the bias term of FullGrad
    (Srinivas & Fleuret, NeurIPS 2019, arXiv 1905.00780) for the network in explanation mode. Constants outside of leaf
    modules (a parameter added in a parent's ``forward``) are not included.

    The cost is little more than one forward and backward pass for the batch. A module whose output has no batch axis
    (an embedding that its parent adds) needs another backward pass for each image.

    Args:
        model: As for :func:`explain`, in evaluation mode. The first axis of all modules' outputs is the batch axis.
        x: (N, C, H, W).
        target: As for :func:`explain`.

    Returns:
        (N,), dtype of ``x``, in units of the logit.

    Raises:
        ValueError: As for :func:`explain`, or the model is in training mode.
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
        with forward_hooks(leaves, partial(_record_constant, constants, n_images)):
            logits = _check_logits(network(x.detach().clone().requires_grad_()), n_images)
        indices = logits.detach().argmax(1) if target is None else _as_indices(target, logits)
        selected = logits.gather(1, indices[:, None])[:, 0]
        terms = x.new_zeros(n_images)
        shared = [constant for constant in constants if not constant.has_batch_axis]
        for constant, grad in _gradients(selected.sum(), [c for c in constants if c.has_batch_axis]):
            terms += (grad * constant.value).flatten(1).sum(1, dtype=x.dtype)
        for n in range(n_images) if shared else ():
            for constant, grad in _gradients(selected[n], shared):
                terms[n] += (grad * constant.value).sum(dtype=x.dtype)
    return terms


@dataclass(frozen=True)
class _Constant:
    """Constant of a module.

    Attributes:
        point: The module's output in the graph.
        value: The module's output for a zero input.
        has_batch_axis: True if the first axis of the output is the batch axis.
    """

    point: Tensor
    value: Tensor
    has_batch_axis: bool


def _gradients(output: Tensor, constants: list[_Constant]) -> list[tuple[_Constant, Tensor]]:
    """Return the gradients of a scalar with respect to the points that it depends on."""
    if not constants or not output.requires_grad:
        return []
    points = [constant.point for constant in constants]
    grads = torch.autograd.grad(output, points, retain_graph=True, allow_unused=True)
    return [(constant, grad) for constant, grad in zip(constants, grads, strict=True) if grad is not None]


#: Types of modules that map zeros to zeros if they have no bias; this need not hold for subclasses.
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
    """True if the output for a zero input is known to be zero, and need not be computed."""
    return type(module) in _LINEAR and getattr(module, "bias", None) is None and "forward" not in vars(module)


def _record_constant(
    constants: list[_Constant],
    n_images: int,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    output: object,
) -> Tensor | None:
    """Forward hook that records the constant of a module."""
    inputs = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    # Only modules with a gradient path from the image: a softmax of detached queries is a dynamic weight.
    on_path = any(arg.requires_grad for arg in inputs)
    if not on_path or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    has_batch_axis = output.requires_grad and all(t.ndim > 0 and len(t) == n_images for t in (output, *inputs))
    # If all inputs become zeros, the constant is the same for all images.
    rows = 1 if has_batch_axis and all(arg.requires_grad for arg in inputs) else None

    def at_zero(arg: object) -> object:
        return torch.zeros_like(arg[:rows]) if isinstance(arg, Tensor) and arg.requires_grad else arg

    with torch.no_grad():
        value = module.forward(*map(at_zero, args), **{key: at_zero(arg) for key, arg in kwargs.items()})
    point = output if output.requires_grad else output.detach().requires_grad_()
    constants.append(_Constant(point, value, has_batch_axis))
    # A copy, so that a later in-place operation such as `out += identity` does not modify `point`.
    return point.clone()


def _unwrap(model: nn.Module) -> nn.Module:
    """Unwrap DDP, which would wait for the gradients of parameters."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_input(x: Tensor) -> None:
    if x.ndim != 4 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (N, C, H, W) with N >= 1, got {x.dtype} {tuple(x.shape)}")


def _check_logits(output: object, n_images: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return a tensor of logits (N, K), got {type(output).__name__}")
    if output.ndim != 2 or len(output) != n_images:
        raise ValueError(f"the model must return logits ({n_images}, K), got {tuple(output.shape)}")
    return output


def _as_indices(target: Tensor | int, logits: Tensor) -> Tensor:
    """Convert the target to (N,) int64 on the device of the logits, and check its range."""
    n_images = len(logits)
    indices = torch.as_tensor(target, device=logits.device)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"target must be integer class indices, got {indices.dtype}")
    if indices.ndim == 0:
        indices = indices.expand(n_images)
    if indices.shape != (n_images,):
        raise ValueError(f"target must be an int or of shape ({n_images},), got shape {tuple(indices.shape)}")
    allowed = range(logits.shape[1])
    invalid = [i for i in indices.tolist() if i not in allowed]
    if invalid:
        raise ValueError(f"target {invalid[0]} is out of range, allowed are 0 to {allowed.stop - 1}")
    # A copy, because autograd cannot save inference tensors.
    return indices.long().clone()


@contextmanager
def _frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode update copies of their running statistics.

    The buffers are replaced, not restored by copying: autograd detects in-place changes of the tensors that it saved.
    Other threads see the copies too. A context-local switch, as explanation mode has it, would work only for the norms
    of this package, and compiled code can't read it. Modules in evaluation mode are left alone.
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
