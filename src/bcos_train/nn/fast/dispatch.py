"""Decide which code computes a layer. Every condition for leaving the fast path stands in this file.

| layer | computed by its definition if |
|---|---|
| all | ``backend="reference"``; under torch.compile/export, tracing, torch.func or forward-mode AD |
| B-cos layers | a replaced ``linear`` or ``input_norm``; a hook on ``linear``, or any global module hook; B = 1 or \
learnable; a bias; explanation mode without `cached_weights` |
| `BcosConv2d` | dilation; padding other than zeros, by name, or wider than half the kernel |
| `Linear` | a bias |
| `BatchNormUncentered2d` | running statistics; explanation mode; a bias; statistics over several processes |

`why` names the reason for a layer, or else the operations for an input. Compilers and transforms need the definitions,
which they fuse or differentiate themselves; a hook on ``linear`` expects ŵ·x, which the fast path never returns; in
explanation mode only `cached_weights` guarantees that no gradient of the weight is needed.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from bcos_train.nn.fast.batch_norm import uncentered_batch_norm
from bcos_train.nn.fast.conv import Convolution, bcos_conv2d, can_box, detached_bcos_conv2d
from bcos_train.nn.fast.gpu_device import GPU_TYPES, uses_triton
from bcos_train.nn.fast.gpu_kernels import GPU
from bcos_train.nn.fast.kernels import EAGER, Kernels, compiled_kernels, normalize, normalize_on_gpu
from bcos_train.nn.fast.linear import bcos_linear, detached_bcos_linear, linear
from bcos_train.nn.functional import is_linear, normalize_weight
from bcos_train.utils.compiling import prepare_to_compile

if TYPE_CHECKING:
    from bcos_train.nn.backend import Accelerated
    from bcos_train.nn.conv import BcosConv2d
    from bcos_train.nn.layer import BcosLayer
    from bcos_train.nn.linear import BcosLinear, Linear
    from bcos_train.nn.norm import BatchNormUncentered2d

__all__ = [
    "CACHE",
    "batch_norm_forward",
    "bcos_conv2d_forward",
    "bcos_linear_forward",
    "has_hooks",
    "is_traced_or_transformed",
    "linear_forward",
    "prepare_backend",
    "unit_weight",
    "why",
]

# --- tracing, transforms, hooks and cached weights --------------------------------------------------------------------


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_traced_or_transformed() -> bool:
    """True under torch.compile, torch.export, torch.jit.trace, make_fx, torch.func or forward-mode AD."""
    is_transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or is_transformed or _is_recorded()


def _is_recorded() -> bool:
    """True under torch.jit.trace, which the older ONNX exporter and TensorBoard's ``add_graph`` use, or make_fx."""
    if torch._C._get_tracing_state() is not None:
        return True
    # The second call takes longer, and is needed only if a mode is active.
    return torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(_PROXY) is not None


def has_hooks(module: nn.Module) -> bool:
    """True if this module has hooks, or global module hooks are registered."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or _has_any_global_hook())


class _Cache(threading.local):
    """Weights that `bcos_train.nn.fast.cached_weights` has replaced, in this thread.

    Not stored in the modules: another thread that uses the same model, or a copy of the model, must not see them.
    """

    def __init__(self) -> None:
        #: The weight that each module computes with.
        self.weights: dict[nn.Module, Tensor] = {}


CACHE = _Cache()


def _cached_weight(module: Any) -> Tensor | None:
    """Return the weight cached for this module, or None.

    Raises:
        RuntimeError: The module has been moved or cast since.
    """
    cached = None if is_traced_or_transformed() else CACHE.weights.get(module)
    if cached is not None and (cached.dtype, cached.device) != (module.weight.dtype, module.weight.device):
        raise RuntimeError("the model was moved or cast within cached_weights(): do that before")
    return cached


def unit_weight(module: Any) -> Tensor:
    """Return ŵ = w / ‖w‖ of a module with a ``weight``, in the shape of the weight; from the cache if it is there."""
    if (cached := _cached_weight(module)) is not None:
        return cached
    weight = module.weight
    if _obstacle(module) is not None:
        return normalize_weight(weight)
    if weight.device.type in GPU_TYPES:  # in the dtype to which autocast would cast it
        return normalize_on_gpu(weight, _autocast_dtype(weight) or weight.dtype)
    return normalize(weight)


def _weight_in_use(module: Any, is_unit: bool = False) -> Tensor:
    if is_unit:
        return unit_weight(module)
    cached = _cached_weight(module)
    return module.weight if cached is None else cached


# --- the decision -----------------------------------------------------------------------------------------------------


#: Methods that the fast path doesn't call.
_FORWARDS, _NORMS = ("forward", "_conv_forward"), ("input_norm", "calc_patch_norms")


def _obstacle(layer: "Accelerated") -> str | None:
    """Return the reason why the definition must compute this layer, or None: conditions common to all layers."""
    if layer.backend == "reference":
        return 'backend="reference"'
    if is_traced_or_transformed():
        return "under torch.compile, torch.export, torch.jit.trace, make_fx, torch.func or forward-mode AD"
    return None


def _bcos_obstacle(layer: "BcosLayer") -> str | None:
    linear: Any = layer.linear
    if (obstacle := _obstacle(layer)) is not None:
        return obstacle
    if _is_customized(layer):
        return "a replaced `linear` or `input_norm`"
    if has_hooks(linear):
        return "a hook on `linear`, or a global module hook, needs the output of `linear`"
    if is_linear(layer.b):
        return "B = 1"
    if isinstance(layer.b, Tensor):
        return "B is learnable"
    if linear.bias is not None:
        return "bias"
    if layer.detach and _cached_weight(linear) is None:
        return "explanation mode outside cached_weights()"
    return None


def _is_customized(layer: "BcosLayer") -> bool:
    """True if a subclass or the user has replaced `linear` or a norm of the input, which the fast path doesn't call."""
    linear, kind = layer.linear, type(layer)
    is_known = type(linear).__module__.startswith(("bcos_train.nn.", "torch.nn.modules."))
    if not (is_known and isinstance(linear, nn.Conv2d | nn.Linear)) or not vars(linear).keys().isdisjoint(_FORWARDS):
        return True
    norms = [getattr(kind, name, kind.input_norm) for name in _NORMS]
    is_replaced = any(not norm.__module__.startswith("bcos_train.nn.") for norm in norms)
    return is_replaced or not vars(layer).keys().isdisjoint(_NORMS)


def _conv_obstacle(layer: "BcosConv2d") -> str | None:
    if (obstacle := _bcos_obstacle(layer)) is not None:
        return obstacle
    conv = layer.linear
    if conv.dilation != (1, 1):
        return "dilation"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or not can_box(conv.kernel_size, conv.padding):
        return "padding other than zeros, by name, or wider than half the kernel"
    return None


def _linear_obstacle(layer: "Linear") -> str | None:
    return _obstacle(layer) or (None if layer.bias is None else "bias")


def _batch_norm_obstacle(norm: "BatchNormUncentered2d") -> str | None:
    if (obstacle := _obstacle(norm)) is not None:
        return obstacle
    if not norm.uses_batch_statistics:
        return "running statistics"
    if norm.detach:
        return "explanation mode"
    if norm.bias is not None:
        return "bias"
    return "statistics over several processes" if norm.is_synchronized else None


def why(layer: nn.Module, x: Tensor) -> str:
    """Say which code computes ``layer(x)`` at this moment, and why if it is the definition.

    Args:
        x: The input. Its device, dtype and ``requires_grad`` select the operations of the fast path; its values and
            shape don't matter.

    Returns:
        ``"fast: <operations>"``, with the dtype and device they run in, or ``"definition: <reason>"``.

    Raises:
        ValueError: The layer has no fast path.
    """
    from bcos_train.nn.conv import BcosConv2d
    from bcos_train.nn.layer import BcosLayer
    from bcos_train.nn.linear import Linear
    from bcos_train.nn.norm import BatchNormUncentered2d

    deciders: tuple[tuple[type, Callable[[Any], str | None]], ...] = (
        (BcosConv2d, _conv_obstacle),
        (BcosLayer, _bcos_obstacle),
        (Linear, _linear_obstacle),
        (BatchNormUncentered2d, _batch_norm_obstacle),
    )
    for kind, decide in deciders:
        if isinstance(layer, kind):
            obstacle = decide(layer)
            return f"fast: {_operations(layer, x)}" if obstacle is None else f"definition: {obstacle}"
    raise ValueError(
        f"{type(layer).__name__} has no fast path; BcosConv2d, BcosLinear, Linear and BatchNormUncentered2d have one"
    )


def _operations(layer: Any, x: Tensor) -> str:
    """Describe the operations of the fast path."""
    if getattr(layer, "detach", False) and x.requires_grad:
        operations = "linear map with a constant scale"
    elif not hasattr(layer, "detach"):
        operations = "matrix product"
    elif layer.backend == "compiled":
        operations = "compiled kernels"
    else:
        operations = "Triton kernels" if _kernels(layer, x) is GPU else "eager operations"
    return f"{operations}, {str(_autocast_dtype(x) or x.dtype).removeprefix('torch.')} on {x.device.type}"


# --- the fast paths ---------------------------------------------------------------------------------------------------


def bcos_conv2d_forward(layer: "BcosConv2d", x: Tensor) -> Tensor | None:
    """Compute ``layer(x)`` as one operation, or return None if the definition must compute it."""
    if _conv_obstacle(layer) is not None:
        return None
    conv: Any = layer.linear
    b: Any = layer.b  # a number: a learnable B is an obstacle
    geometry = Convolution(conv.kernel_size, conv.stride, conv.padding, conv.groups)
    weight = _weight_in_use(conv, layer.normalize_weight)
    if layer.detach and x.requires_grad:
        return _apply_in_autocast_dtype(detached_bcos_conv2d, x, weight, geometry, b, layer.max_out)
    return _apply_in_autocast_dtype(bcos_conv2d, x, weight, geometry, b, layer.max_out, _kernels(layer, x))


def bcos_linear_forward(layer: "BcosLinear", x: Tensor) -> Tensor | None:
    """See `bcos_conv2d_forward`."""
    if _bcos_obstacle(layer) is not None:
        return None
    b: Any = layer.b
    weight = _weight_in_use(layer.linear, layer.normalize_weight)
    if layer.detach and x.requires_grad:
        return _apply_in_autocast_dtype(detached_bcos_linear, x, weight, b, layer.max_out)
    return _apply_in_autocast_dtype(bcos_linear, x, weight, b, layer.max_out, _kernels(layer, x))


def linear_forward(layer: "Linear", x: Tensor) -> Tensor | None:
    """See `bcos_conv2d_forward`."""
    if _linear_obstacle(layer) is None:
        return _apply_in_autocast_dtype(linear, x, _weight_in_use(layer))
    cached = _cached_weight(layer)
    return None if cached is None else F.linear(x, cached, layer.bias)


def batch_norm_forward(layer: "BatchNormUncentered2d", x: Tensor) -> Tensor | None:
    """See `bcos_conv2d_forward`."""
    if _batch_norm_obstacle(layer) is not None:
        return None
    layer.check_input(x)
    out, mean, var = uncentered_batch_norm(x, layer.weight, layer.eps, _kernels(layer, x))
    if layer.training and layer.running_var is not None:
        layer.update_running_statistics(mean, var, x.numel() // layer.num_features)
    return out


def _kernels(layer: Any, x: Tensor) -> Kernels:
    if layer.backend == "compiled":
        return compiled_kernels()
    return GPU if x.device.type in GPU_TYPES and uses_triton(x) else EAGER


def _autocast_type(x: Tensor) -> str:
    """Return the device type whose autocast settings apply to ``x``: CUDA's for meta tensors that stand for a GPU's."""
    return "cuda" if x.is_meta and x.device.type in GPU_TYPES else x.device.type


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype, or None if autocast is off or doesn't apply to ``x``."""
    kind = _autocast_type(x)
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Autocast leaves float64 tensors unchanged, in all of torch.
    return torch.get_autocast_dtype(kind) if is_on and x.dtype != torch.float64 else None


def _apply_in_autocast_dtype(function: Callable[..., Tensor], x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """Return ``function(x, weight, *options)`` with both tensors in autocast's dtype, and autocast off inside."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return function(x, weight, *options)
    kind = _autocast_type(x)
    # Entering the context manager takes ten times as long, and this runs a hundred times per step.
    torch.set_autocast_enabled(kind, False)
    try:
        return function(x.to(dtype), weight.to(dtype), *options)
    finally:
        torch.set_autocast_enabled(kind, True)


def prepare_backend(backend: str) -> None:
    """Check that this machine can run the backend, and prepare it.

    Raises:
        ValueError: No compiler for ``"compiled"``.
    """
    if backend == "compiled":
        prepare_to_compile('backend="compiled"')
