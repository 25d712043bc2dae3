"""Time and memory of a training step with a loss on explanations, relative to a plain step.

    python benchmarks/explanation_training.py --repeats 7 --models resnet18 simple_vit_ti_patch16_224 --size 112

All kinds of steps take turns in one process; the figures are medians of ratios to the plain step next to them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import ROOT, check_writable, environment, parser_for, resident_growth, write
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.dataset import BcosEncoding
from bcos_train.distillation import DistillationOptions, load_teacher
from bcos_train.guidance import GuidanceOptions
from bcos_train.loss import UniformOffLabelBinaryCrossEntropy
from bcos_train.task import Classification, Distillation, Guidance, Network, Task, TrainingBatch

#: Kinds of steps, the plain one first.
STEPS = ("plain", "energy", "kd", "e2kd")


def task_of(kind: str, student: nn.Module, teacher: str) -> Task:
    loss = UniformOffLabelBinaryCrossEntropy()

    def distillation(weight: float) -> Task:
        options = DistillationOptions(teacher=teacher, teacher_weights="random", explanation_weight=weight)
        return Distillation(loss, load_teacher(options, 1000), options, student)

    if kind == "plain":
        return Classification(loss)
    if kind == "energy":
        return Guidance(loss, GuidanceOptions(loss="energy"))
    return distillation(1.0 if kind == "e2kd" else 0.0)


def step_of(task: Task, network: Network, batch: TrainingBatch) -> Callable[[], None]:
    optimizer = torch.optim.Adam(network.model.parameters())

    def step() -> None:
        task(network, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_batch(n: int, size: int, device: str) -> TrainingBatch:
    rgb: Tensor = torch.rand(n, 3, size, size, device=device)
    labels = torch.arange(n, device=device)
    x = BcosEncoding().encode(rgb).contiguous(memory_format=torch.channels_last)
    corners = torch.tensor([size // 4, size // 4, size // 2, size // 2], device=device).expand(n, 4)
    boxes = torch.cat([labels[:, None], corners], 1)[:, None]
    return TrainingBatch(x, labels, rgb, labels, {"boxes": boxes})


def steps_of(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    network = Network(create_model(name).to(arguments.device).to(memory_format=torch.channels_last))
    batch = random_batch(arguments.batch, arguments.size, arguments.device)
    kinds = [kind for kind in STEPS if kind == "plain" or kind in arguments.steps]
    return {kind: step_of(task_of(kind, network.model, arguments.teacher), network, batch) for kind in kinds}


def measure_seconds(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for repeat in range(repeats + 1):
        for kind, step in steps.items():
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[kind].append(time.perf_counter() - started)
    return seconds


def peak_memory_in_subprocess(name: str, kind: str, options: list[str]) -> float:
    """Return the growth of resident memory in MiB during a step on the CPU, in a process of its own."""
    command = [sys.executable, __file__, *options, "--models", name, "--steps", kind, "--peak-memory-of", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = parser_for("explanation-training", "time and memory of a step with a loss on explanations", repeats=7)
    parser.add_argument("--models", nargs="+", default=["resnet18", "simple_vit_ti_patch16_224"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="plain ones are always measured")
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory_of:
        step = steps_of(arguments.models[0], arguments)[arguments.peak_memory_of]
        step()  # creates the optimizer's state
        print(resident_growth(step))
        return
    output = arguments.output or ROOT / f"benchmarks/results/explanation-training-{arguments.device}-float32.json"
    check_writable(output)
    options = ["--size", str(arguments.size), "--batch", str(arguments.batch), "--teacher", arguments.teacher]
    rows = []
    for name in arguments.models:
        seconds = measure_seconds(steps_of(name, arguments), arguments.repeats, arguments.device)
        memory = {
            kind: peak_memory_in_subprocess(name, kind, options) if arguments.device == "cpu" else None
            for kind in seconds
        }
        for kind, times in seconds.items():
            ratio = statistics.median(t / plain for t, plain in zip(times, seconds["plain"], strict=True))
            rows.append({"model": name, "step": kind, "seconds": statistics.median(times), "ratio": ratio})
            rows[-1]["memory_mib"] = memory[kind]
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    write(output, {"environment": environment(arguments.device), **vars(arguments), "output": None, "rows": rows})


if __name__ == "__main__":
    main()
