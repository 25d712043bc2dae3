"""Measure the cost of B-cos networks relative to standard networks and to the official code.

    python benchmarks/speed.py                                  # all models, on a GPU if available
    python benchmarks/speed.py --models resnet50 --batch-size 8 --no-memory

The variants of a model alternate step by step in one process, so that a busy machine slows all equally; medians are
reported. Peak memory is measured in a separate process per variant on a CPU, in the same process on a GPU. Writes JSON
with the machine, the versions and the commit after each model, and prints a table.

Variants: `standard` (torchvision's network, or this package's standard ViT), `official` (PyPI `bcos` 0.1.3 unchanged,
in the contiguous format), `official channels_last`, and this package's backends `reference`, `fused` and `compiled`.
All except `official` run in channels_last. With `--variants` also `fused contiguous`, in the contiguous format,
`whole`, the whole network compiled as with `trainer.compile=true`, and `standard whole`, the compiled standard
network.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from common import ROOT, environment, official_model, parser_for, positive, resident_growth, write
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.nn import BACKENDS, cached_weights

MODELS = (
    "resnet18",
    "resnet50",
    "densenet121",
    "convnext_tiny",
    "vgg11_bnu",
    "simple_vit_s_patch16_224",
    "vitc_s_patch1_14",
    "resnet20",
)
TASKS = ("train", "inference", "explain")
OFFICIAL = ("official", "official channels_last")
CONTIGUOUS = ("official", "fused contiguous")
OURS = (*BACKENDS, "fused contiguous")
DEFAULT_VARIANTS = ("standard", *OFFICIAL, *BACKENDS)


@dataclass(frozen=True)
class Setting:
    """Settings that all variants of a model share."""

    model: str
    batch_size: int
    size: int
    device: str
    dtype: str

    @property
    def autocast(self) -> AbstractContextManager[object]:
        dtype = getattr(torch, self.dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device, dtype=dtype)


def build(variant: str, setting: Setting) -> nn.Module:
    """Build a variant's network with random weights."""
    torch.manual_seed(0)
    if variant.startswith("standard"):
        network = standard_model(setting.model)
    elif variant in OFFICIAL:
        network = official_model(setting.model)
    else:
        backend = variant if variant in BACKENDS else "fused"
        network = create_model(setting.model, backend=backend)  # type: ignore[arg-type]
    network = network.to(setting.device)
    if variant not in CONTIGUOUS:
        network = network.to(memory_format=torch.channels_last)
    if variant.endswith("whole"):
        network.compile(dynamic=False)
    return network


def standard_model(name: str) -> nn.Module:
    if name == "resnet20":
        return cifar_resnet20()
    return create_model(f"standard_{'vgg11_bn' if name == 'vgg11_bnu' else name}")


def cifar_resnet20() -> nn.Module:
    """Build the ResNet-20 of He et al. 2016 for images of 32 px from torchvision's blocks."""
    from torchvision.models.resnet import BasicBlock

    def stage(inplanes: int, planes: int, stride: int) -> nn.Sequential:
        projection = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        first = BasicBlock(inplanes, planes, stride, projection if inplanes != planes else None)
        return nn.Sequential(first, BasicBlock(planes, planes), BasicBlock(planes, planes))

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    stages = (stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2))
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(variant: str, setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(setting.batch_size, 3, setting.size, setting.size, generator=generator).to(setting.device)
    x = x if variant.startswith("standard") else torch.cat([x, 1 - x], dim=1)
    return x.contiguous(memory_format=torch.channels_last) if variant not in CONTIGUOUS else x


def task(name: str, network: nn.Module, x: Tensor, variant: str, setting: Setting) -> Callable[[], None]:
    """Return one step of a task, as a function without arguments."""

    def train() -> None:
        with setting.autocast:
            loss = network(x).square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference() -> None:
        with setting.autocast:
            network(x)

    def explanation() -> None:
        if variant in OFFICIAL:
            leaf = x.detach().clone().requires_grad_()
            with network.explanation_mode():  # type: ignore[operator]
                selected = network(leaf).amax(1).sum()
                torch.autograd.grad(selected, leaf)
        elif variant.startswith("standard"):
            inference()  # explanations are compared with the forward pass
        else:
            explain(network, x)

    network.train(name == "train")
    return {"train": train, "inference": inference, "explain": explanation}[name]


def medians(steps: Mapping[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds per step of each; the steps alternate."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            step()
            wait()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(setting: Setting, variants: list[str], tasks: list[str], repeats: int, memory: bool) -> dict[str, Any]:
    """Measure the time of each task and the peak memory of a training step, for each variant of a model."""
    torch.backends.cudnn.benchmark = True  # all images have the same size
    torch._dynamo.reset()  # by default, a function is compiled for at most eight combinations of shapes
    result: dict[str, Any] = {"model": setting.model, "batch_size": setting.batch_size, "size": setting.size}
    networks = {variant: build(variant, setting) for variant in variants}
    inputs = {variant: images(variant, setting) for variant in variants}
    for name in tasks:
        steps = {v: task(name, networks[v], inputs[v], v, setting) for v in variants}
        with ExitStack() as stack:
            for v in variants:
                if v in OURS and name != "train":
                    stack.enter_context(cached_weights(networks[v]))
            result[name] = medians(steps, repeats, setting.device)
    if memory and setting.device == "cuda":
        steps = {v: task("train", networks[v], inputs[v], v, setting) for v in variants}
        result["memory"] = {v: allocated_peak(step) for v, step in steps.items()}
    elif memory:
        del networks, inputs, steps
        result["memory"] = {variant: peak_memory_in_subprocess(variant, setting) for variant in variants}
    return result


def allocated_peak(step: Callable[[], None]) -> float:
    """Return the peak memory in MiB that a step allocates on the GPU in addition to what is allocated before it."""
    step()  # allocates persistent buffers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory_in_subprocess(variant: str, setting: Setting) -> float:
    """Return the additional peak memory of a training step in MiB, measured in a separate process."""
    command = [sys.executable, __file__, "--peak-memory-of", json.dumps({"variant": variant, **vars(setting)})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_memory(variant: str, setting: Setting) -> float:
    """Return the growth of this process's resident memory in MiB during a training step."""
    network, x = build(variant, setting), images(variant, setting)
    step = task("train", network, x, variant, setting)
    # Warm up with a small step, which loads and compiles code.
    small = Setting(setting.model, 2, setting.size, setting.device, setting.dtype)
    task("train", network, images(variant, small), variant, small)()
    return resident_growth(step)


def table(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """Format in Markdown, one row per model, task and variant, with ratios to the standard and official networks."""
    lines = ["| model | task | variant | ms | x standard | x official |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for result in results:
        for name in [*tasks, "memory"]:
            values = result.get(name, {})
            base, official = values.get("standard"), values.get("official channels_last", values.get("official"))
            for variant, value in values.items():
                shown = f"{value:.0f} MiB" if name == "memory" else f"{value * 1e3:.1f}"
                ratios = [f"{value / other:.2f}" if other else "" for other in (base, official)]
                lines.append(f"| {result['model']} | {name} | {variant} | {shown} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Format in Markdown, one row per model: cost of the default backend relative to standard and official networks."""
    lines = [
        "| model | training step | x standard | x official | x official, contiguous | peak memory | x standard "
        "| x official | inference, x standard | explanation, x inference of standard |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for result in results:
        columns = [
            ("train", ("standard", *reversed(OFFICIAL)), lambda value: f"{value * 1e3:.0f} ms"),
            ("memory", ("standard", OFFICIAL[1]), lambda value: f"{value:.0f} MiB"),
            ("inference", ("standard",), None),
            ("explain", ("standard",), None),
        ]
        cells = [f"`{result['model']}`, {result['batch_size']} x {result['size']} px"]
        for name, others, show in columns:
            ours = result[name]["fused"]
            cells += [show(ours)] if show else []
            cells += [f"{ours / result[name][other]:.2f}" for other in others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_for("speed", __doc__.splitlines()[0], repeats=7)
    variants = [*DEFAULT_VARIANTS, "fused contiguous", "whole", "standard whole"]
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT_VARIANTS), choices=variants)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--batch-size", type=positive, help="default: 8, for resnet20 64")
    parser.add_argument("--size", type=positive, help="image size in pixels; default: 224, for resnet20 32")
    parser.add_argument("--no-memory", action="store_true", help="don't measure peak memory")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.peak_memory_of is not None:
        options = json.loads(arguments.peak_memory_of)
        print(peak_memory(options.pop("variant"), Setting(**options)))
        return
    output = arguments.output or ROOT / f"benchmarks/results/speed-{arguments.device}-{arguments.dtype}.json"
    machine, results = environment(arguments.device), []
    for model in arguments.models:
        is_small = model == "resnet20"
        batch_size = arguments.batch_size or (64 if is_small else 8)
        size = arguments.size or (32 if is_small else 224)
        setting = Setting(model, batch_size, size, arguments.device, arguments.dtype)
        results.append(
            measure(setting, arguments.variants, arguments.tasks, arguments.repeats, not arguments.no_memory)
        )
        print(table(results[-1:], arguments.tasks), flush=True)
        write(output, {"environment": machine, "dtype": arguments.dtype, "results": results})
    print(f"\n{table(results, arguments.tasks)}")
    if {*DEFAULT_VARIANTS} <= {*arguments.variants} and {*TASKS} <= {*arguments.tasks} and not arguments.no_memory:
        print(f"\n{summary(results)}")
    print(f"\nwritten: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
