"""Count memory traffic of compiled ResNet blocks on an H100, as Inductor schedules their kernels, without a GPU.

    python benchmarks/lowered_traffic.py --batch-size 256

Two bottleneck blocks, 256-64-64-256 channels at 56x56 with autocast to bfloat16 and channels last, are traced on the
CPU by `torch.compile`. Their graphs are then moved to "cuda" and lowered and fused by Inductor; no kernel runs. The
bytes are Inductor's own count: every kernel reads its inputs and writes its outputs once.

This patches torch for the whole process, so don't import it into another program.
"""

import argparse
import copy
import os
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Set before torch reads it: no worker processes, since no code is compiled.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from common import positive
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.utils import _pytree
from torchvision.models.resnet import Bottleneck as StandardBottleneck

from bcos_train.model.resnet import Bottleneck
from bcos_train.nn import BcosConv2d, make_norm

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    gcnArchName="",
    warp_size=32,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
)
CUDA = torch.device("cuda", 0)
PASSES = ("forward", "backward")


def pretend_h100() -> None:
    """Patch the GPU properties that Inductor reads from torch."""
    values = {"type": "cuda", "index": 0, "cc": 90, **vars(H100)}
    properties = DeviceProperties(**{name: values[name] for name in DeviceProperties._fields})
    patches = (
        (DeviceProperties, "create", properties),
        (CudaInterface, "is_available", True),
        (CudaInterface.Worker, "get_device_properties", H100),
        (torch.cuda, "get_device_properties", H100),
        (torch.cuda, "get_device_capability", (9, 0)),
        # The backend of a convolution determines its layout.
        (torch._C, "_select_conv_backend", torch._C._ConvBackend.Cudnn),  # type: ignore[attr-defined]
        (torch._C, "_conv_determine_backend_memory_format", torch.channels_last),
    )
    for owner, name, value in patches:
        setattr(owner, name, staticmethod(partial(_return, value)))


def _return(value: Any, *_: object, **__: object) -> Any:
    return value


def lower(graph: fx.GraphModule, inputs: Sequence[Any], traffic: dict[str, int], **options: Any) -> Any:
    """Replace Inductor's compiler: count the bytes of a graph, and return a function of uninitialized tensors."""
    is_backward = options.get("is_backward", False)
    compile_fx._recursive_record_original_output_strides(graph)
    fake_mode = compile_fx.fake_tensor_prop(graph, inputs)
    with V.set_fake_mode(fake_mode):
        compile_fx._recursive_post_grad_passes(graph, options.get("is_inference", False))

    def on_cuda(value: Any) -> Any:
        if isinstance(value, torch.device):
            return CUDA
        if isinstance(value, Tensor):
            with fake_mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return value

    moved = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(values, on_cuda) for values in (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = _pytree.tree_map(on_cuda, node.meta["val"])
    lowering = GraphLowering(moved, is_backward=is_backward, graph_id=len(traffic))
    with V.set_debug_handler(DebugContext()), V.set_fake_mode(fake_mode), V.set_graph_handler(lowering):
        lowering.run(*map(on_cuda, inputs))
        # The first steps of `GraphLowering.codegen`, after which kernels are fused; their code isn't needed.
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        traffic[PASSES[is_backward]], *_ = lowering.count_bytes()

    (output,) = graph.graph.find_nodes(op="output")
    values = [node.meta["val"] if isinstance(node, fx.Node) else node for node in output.args[0]]

    def run(*_: Any) -> list[Any]:
        return [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if isinstance(value, Tensor) else value
            for value in values
        ]

    return make_boxed_func(run)


def count(blocks: nn.Module, x: Tensor) -> dict[str, int]:
    """Return the bytes of the forward and the backward pass of a training step, compiled for an H100.

    Args:
        blocks, x: On the CPU, where they are traced.
    """
    traffic: dict[str, int] = {}
    backend = partial(compile_fx.compile_fx, inner_compile=partial(lower, traffic=traffic))
    torch._dynamo.reset()
    torch._functorch.config.enable_autograd_cache = False  # these graphs can't be cached
    compiled = torch.compile(blocks.train(), backend=backend, fullgraph=True, dynamic=False)
    # The statistics of norms as on devices other than a CPU.
    var_mean = partial(torch.var_mean, correction=0, keepdim=True)
    with mock.patch("bcos_train.nn.fast.moments._var_mean", var_mean):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = compiled(x)
        out.backward(out.detach())
    return traffic


def make_blocks(is_standard: bool) -> nn.Module:
    """Build two bottleneck blocks without downsampling: torchvision's, or ours with the norm and B of the recipes."""
    if is_standard:
        return nn.Sequential(StandardBottleneck(256, 64), StandardBottleneck(256, 64))
    norm, conv = make_norm("bnu-linear"), partial(BcosConv2d, b=2)
    return nn.Sequential(*(Bottleneck(256, 64, 1, None, 1, 64, 1, norm, conv, 0.0) for _ in range(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=positive, default=256)
    args = parser.parse_args()
    pretend_h100()
    print("| blocks | forward | backward | both | x standard |")
    print("| --- " + "| ---: " * 4 + "|")
    x = torch.empty(args.batch_size, 256, 56, 56, dtype=torch.bfloat16, memory_format=torch.channels_last)
    x.requires_grad_()
    totals = []
    for name in ("standard", "B-cos"):
        traffic = count(make_blocks(name == "standard").to(memory_format=torch.channels_last), x)
        totals.append(sum(traffic.values()))
        numbers = " | ".join(f"{size / 1e9:.2f} GB" for size in (*(traffic[part] for part in PASSES), totals[-1]))
        print(f"| {name} | {numbers} | {totals[-1] / totals[0]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
