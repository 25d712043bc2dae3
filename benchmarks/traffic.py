"""Count memory traffic and operations of a training step on a GPU, without a GPU.

    python benchmarks/traffic.py --models resnet50 densenet121 --batch-size 256

The step is traced on the meta device on the GPU's code path: bfloat16 as under autocast, channels last. Each operation
counts the bytes of the tensors that it reads and writes, once each, except that batch norms read twice. Caches and
workspace are ignored. The traffic is a lower bound on the time of a step; many small operations make the CPU the
bottleneck instead. An operation on a list of tensors counts as one, since it needs few launches.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import positive
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bcos_train.model import create_model, list_models
from bcos_train.nn.fast.gpu_device import GPU_TYPES
from bcos_train.optimizer.clipping import adaptive_clip_grad_

#: Operations without a kernel launch.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "detach", "lift_fresh"),
    *("_record_function_enter_new", "_record_function_exit"),
}
#: Indices of the inputs that are read twice: first for statistics or sums.
READ_AGAIN = {"native_batch_norm": (0,), "native_batch_norm_backward": (0, 1)}
#: Indices of the arguments that in-place operations write to.
WRITTEN = {
    **dict.fromkeys(("square_", "add_product_", "_foreach_copy_", "_foreach_add_"), (0,)),
    "_fused_adam_": (0, 2, 3),  # weights and both moments
}

PARTS = ("forward", "backward", "clipping", "optimizer")


@dataclass
class Part:
    """Counts of one part of a step.

    Attributes:
        operations: Number of operations by name.
        bytes: Bytes that they read and write, by name.
    """

    operations: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {name: Part() for name in PARTS}
        self.current = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "convolution_backward":  # on a GPU, gradients have the memory formats of their tensors
            grads = (g if g is None else _like(g, x) for g, x in zip(result[:2], args[1:3], strict=True))
            result = (*grads, result[2])
        if name not in FREE and not func.is_view:
            part = self.parts[self.current]
            part.operations[name] += 1
            part.bytes[name] += _traffic(name, args, kwargs or {}, result)
        return result


def _like(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_strided(grad.shape, x.stride(), dtype=grad.dtype, device="meta")


def _traffic(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    if name == "convolution_backward":  # two products, each reads two tensors and writes one
        sizes = [_size(x) for x in args[:3]]
        return sum(sum(sizes) for needed in args[-1][:2] if needed)
    inputs = {id(x): _size(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    again = sum(_size(args[index]) for index in READ_AGAIN.get(name, ()))
    results = [args[index] for index in WRITTEN.get(name, ())] or result
    written = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return sum(inputs.values()) + again + sum(map(_size, written))


def _size(x: Tensor) -> int:
    """Return the bytes of a tensor, without those of expanded axes."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


class _Autocast(TorchFunctionMode):
    """Apply the casts of autocast on CUDA, which doesn't support meta tensors."""

    MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)
    LOW = (F.conv2d, torch.conv2d, F.linear, *MATMULS, F.scaled_dot_product_attention)
    HIGH = (F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.group_norm)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.LOW:
            args = tuple(_cast(x, torch.float32, torch.bfloat16) for x in args)
        elif func in self.HIGH:
            args = tuple(_cast(x, torch.bfloat16, torch.float32) for x in args)
        return func(*args, **(kwargs or {}))


def _cast(x: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return x.to(target) if isinstance(x, Tensor) and x.dtype == source else x


def _update_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


def _backward_reduce(grad: Tensor, x: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(mean) for _ in range(4))


#: Shapes of results of operations that torch only implements for CUDA.
META = {
    "batch_norm_update_stats": _update_stats,
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
}


@contextmanager
def _meta_as_gpu() -> Iterator[None]:
    """Let meta tensors use the GPU's code path, with autocast to bfloat16 and fused optimizers."""
    library = torch.library.Library("aten", "IMPL")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        for name, shapes in META.items():
            library.impl(name, shapes, "Meta")
        GPU_TYPES.add("meta")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        # torch can compute the shapes of a fused step, but its optimizers reject meta tensors.
        with mock.patch.object(import_module("torch.optim.adam"), "_device_dtype_check_for_fused"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        GPU_TYPES.discard("meta")
        library._destroy()


def count_step(name: str, batch_size: int, size: int = 224) -> dict[str, Part]:
    """Count a training step of model ``name``: forward and backward pass, adaptive gradient clipping, fused Adam.

    Args:
        name: Model name; models that begin with ``standard_`` take 3 channels, others 6.
        batch_size: Number of images.
        size: Height and width in pixels.
    """
    with torch.device("meta"):
        network = create_model(name)
    channels = 3 if name.startswith("standard_") else 6
    return count(network, torch.empty(batch_size, channels, size, size, device="meta"))


def count(network: nn.Module, x: Tensor) -> dict[str, Part]:
    """Count as `count_step`, for a network and images on the meta device; converts the network to channels last."""
    network = network.to(memory_format=torch.channels_last).train()
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    with _meta_as_gpu():
        with _Count() as counter, _Autocast():
            loss = network(x).float().square().mean()
            counter.current = "backward"
            loss.backward()
            counter.current = "clipping"
            adaptive_clip_grad_(network.parameters())
        optimizer.step()  # uncounted: the first step allocates the moments
        with counter:
            counter.current = "optimizer"
            optimizer.step()
    return counter.parts


def gigabytes(parts: Mapping[str, Part]) -> float:
    """Return the traffic of the whole step."""
    return sum(part.bytes.total() for part in parts.values()) / 1e9


def operations(parts: Mapping[str, Part]) -> int:
    """Return the number of operations of the whole step."""
    return sum(part.operations.total() for part in parts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--size", type=positive, default=224, help="image size in pixels")
    parser.add_argument("--details", action="store_true", help="operations with the most traffic")
    args = parser.parse_args()
    print(f"| model | per step | x standard | operations | {' | '.join(PARTS)} |")
    print("| --- " + "| ---: " * (3 + len(PARTS)) + "|")
    details = []
    for model in args.models:
        if f"standard_{model}" not in list_models() or model not in list_models():
            parser.error(f"--models {model}: no such B-cos model with a standard counterpart")
    for model in args.models:
        standard = count_step(f"standard_{model}", args.batch_size, args.size)
        ours = count_step(model, args.batch_size, args.size)
        for name, parts in ((f"standard_{model}", standard), (model, ours)):
            numbers = " | ".join(str(parts[part].operations.total()) for part in PARTS)
            ratio = gigabytes(parts) / gigabytes(standard)
            print(f"| {name} | {gigabytes(parts):.1f} GB | {ratio:.2f} | {operations(parts)} | {numbers} |", flush=True)
            details += [(name, part, *row) for part in PARTS[:2] for row in parts[part].bytes.most_common(12)]
            details += [(name, part, k, -n) for part in PARTS[:2] for k, n in parts[part].operations.most_common(14)]
    if args.details:
        for name, part, operation, number in details:
            shown = f"{number / 1e9:.2f} GB" if number > 0 else f"{-number} calls"
            print(f"{name:24s} {part:10s} {operation:32s} {shown}")


if __name__ == "__main__":
    main()
