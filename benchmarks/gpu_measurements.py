"""Measurements of benchmarks/gpu_check.py."""

import copy
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, environment, official_model, use_tf32
from grid_pointing import draw, official_scores, our_scores
from isolation import READY, Pairs
from speed import OFFICIAL, Setting, build, images
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.dataset import BcosEncoding
from bcos_train.explanation import constant_term
from bcos_train.nn import BatchNormUncentered2d, cached_weights, set_backend
from bcos_train.nn.fast.kernels import EAGER, Kernels, compiled_kernels
from bcos_train.optimizer import adaptive_clip_grad_

QUANTITIES = ("logits", "input gradient", "weight gradients", "running variances")


@dataclass(frozen=True)
class Scale:
    """Size of a measurement.

    Attributes:
        pixels: Size of ImageNet's images.
        parity_pixels: Size of the images on which results are compared with those in float64.
        small: Use the smallest models and batches, and let ``torch.compile`` trace but not compile.
    """

    device: str
    pixels: int
    parity_pixels: int
    repeats: int
    small: bool = False

    def model(self, name: str) -> str:
        if not self.small or name.startswith("simple_vit"):
            return name
        return "resnet20"

    def batch_size(self, n: int) -> int:
        return 2 if self.small else n


ON_GPU = Scale("cuda", pixels=224, parity_pixels=64, repeats=10)
DRY = Scale("cpu", pixels=32, parity_pixels=32, repeats=1, small=True)


def synchronize(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], scale: Scale, warm_up: int = 3) -> float:
    """Return the median time of a call."""
    for _ in range(1 if scale.small else warm_up):
        function()
    synchronize(scale)
    times = []
    for _ in range(scale.repeats):
        if scale.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            function()
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def rounded(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


# ---- the GPU


def card(scale: Scale) -> Pairs:
    """Yield machine and versions, memory bandwidth and the rate of matrix products."""
    if scale.device == "cuda":
        torch.cuda.init()  # raises an error without a GPU
        yield "cuDNN", torch.backends.cudnn.version()
    yield "environment", environment(scale.device)
    yield "cores", os.cpu_count()
    x = torch.randn(2**16 if scale.small else 2**29, device=scale.device).bfloat16()
    y = torch.empty_like(x)
    yield "copy, TB/s", rounded(2 * x.nbytes / milliseconds(lambda: y.copy_(x), scale) / 1e9)
    n = 64 if scale.small else 8192
    a, b = (torch.randn(n, n, device=scale.device).bfloat16() for _ in range(2))
    yield "matrix product in bfloat16, TFLOP/s", rounded(2 * n**3 / milliseconds(lambda: a @ b, scale) / 1e9)


# ---- correctness


def parity(scale: Scale, model: str) -> Pairs:
    """Yield relative errors of a training step in float32 (without TF32) and bfloat16, against float64 on the CPU.

    The fused backend should not be less accurate than the reference. The last results are completeness errors of
    explanations.
    """
    use_tf32(False)
    torch.manual_seed(0)
    half = torch.rand(4, 3, scale.parity_pixels, scale.parity_pixels)
    x = torch.cat([half, 1 - half], dim=1).contiguous(memory_format=torch.channels_last)
    # A logit bias would dominate the logits and hide errors. Without MaxOut, since rounding can change the unit that is
    # the maximum.
    options: dict[str, Any] = {"max_out": 1} if scale.small and model.startswith("resnet") else {}
    network: Any = create_model(scale.model(model), logit_bias=0.0, **options).to(memory_format=torch.channels_last)
    direction = torch.randn(len(x), network.num_classes)
    expected = training_outcome(copy.deepcopy(network).double(), x.double(), direction.double())
    for dtype, limit in (("float32", 1e-3), ("bfloat16", 0.1)):
        errors = {}
        for backend in ("reference", "fused"):
            candidate = copy.deepcopy(network).to(scale.device)
            set_backend(candidate, backend)
            with torch.autocast(scale.device, torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                outcome = training_outcome(candidate, x.to(scale.device), direction.to(scale.device))
            errors[backend] = {
                key: relative_error(*pair) for key, *pair in zip(QUANTITIES, outcome, expected, strict=True)
            }
            yield f"{backend} {dtype}", errors[backend]
        # Twice, since the rounding errors of both are independent.
        inaccurate = [key for key, value in errors["fused"].items() if value > max(2 * errors["reference"][key], 1e-5)]
        yield f"{dtype} is accurate", not inaccurate and errors["reference"]["logits"] < limit
    network = network.to(scale.device).eval()
    for tf32 in (False, True):
        use_tf32(tf32)
        yield f"completeness error, TF32 {'on' if tf32 else 'off'}", completeness(network, x.to(scale.device))


def training_outcome(network: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Return the `QUANTITIES` of a step with the loss ``(logits * direction).sum()``."""
    leaf = x.clone().requires_grad_()
    logits = network.train()(leaf)
    (logits * direction).sum().backward()
    assert leaf.grad is not None
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    variances = [b.flatten() for name, b in network.named_buffers() if name.endswith("running_var")]
    return [logits.detach(), leaf.grad, torch.cat(gradients), torch.cat(variances or [leaf.new_zeros(1)])]


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.cpu().double(), expected.cpu().double()
    return rounded(((value - expected).norm() / expected.norm().clamp(min=1e-30)).item())


def completeness(network: nn.Module, x: Tensor) -> float:
    """Return the largest relative difference between a logit and the sum of its contributions."""
    explanation = explain(network, x)
    logit = explanation.logits.gather(1, explanation.target[:, None])[:, 0]
    total = explanation.contribution_map.sum((1, 2)) + constant_term(network, x, explanation.target)
    return rounded(((total - logit).abs() / logit.abs()).max().item())


# ---- speed


def training(scale: Scale, model: str, batch_size: int, variants: Sequence[str], prepare: bool = False) -> Pairs:
    """Yield throughput of a training step with fused Adam in bfloat16, time to queue its kernels, and peak memory.

    With ``prepare`` (one variant only), the first step, which compiles the network, runs before `READY`.
    """
    torch.backends.cudnn.benchmark = True
    use_tf32(True)
    torch._inductor.config.compile_threads = 2  # several networks are compiled in parallel
    for variant in variants:
        # The official code needs more memory.
        n = scale.batch_size(batch_size) // (2 if variant in OFFICIAL else 1)
        setting = Setting(scale.model(model), n, scale.pixels, scale.device, "bfloat16")
        try:
            yield from train_variant(variant, setting, scale, prepare)
        except (torch.OutOfMemoryError, ImportError) as error:  # the other variants may still work
            yield variant, {"error": str(error)[:200]}
        torch.cuda.empty_cache()


def train_variant(variant: str, setting: Setting, scale: Scale, prepare: bool) -> Pairs:
    started = time.perf_counter()
    step = training_step(variant, setting, scale)
    step()
    synchronize(scale)
    first = time.perf_counter() - started
    if prepare:
        torch.cuda.empty_cache()
        yield READY
    rates = measure_training(step, setting.batch_size, scale)
    yield variant, {"images": setting.batch_size, **rates, "first step, s": rounded(first)}


def training_step(variant: str, setting: Setting, scale: Scale) -> Callable[[], None]:
    if scale.small and variant.endswith("whole"):
        network = build("standard" if variant.startswith("standard") else "fused", setting)
        network.compile(dynamic=False, backend="eager")
    else:
        network = build(variant, setting)
    forward: Callable[[Tensor], Tensor] = network
    if variant == "blocks":
        from bcos_train.training.compilation import CompiledNetwork

        forward = CompiledNetwork(network, setting.batch_size)
    x = images(variant, setting)
    target = torch.rand(len(x), 10 if setting.model == "resnet20" else 1000, device=setting.device)
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with setting.autocast:
            logits = forward(x)
        F.binary_cross_entropy_with_logits(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_training(step: Callable[[], None], n: int, scale: Scale) -> dict[str, float]:
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    time_of_step = milliseconds(step, scale, warm_up=2)
    started = time.perf_counter()
    step()
    queued = (time.perf_counter() - started) * 1e3  # close to the time of the step if the CPU is the bottleneck
    synchronize(scale)
    result = {"images/s": rounded(n / time_of_step * 1e3), "ms": rounded(time_of_step), "queued in ms": rounded(queued)}
    if scale.device == "cuda":
        result["peak MiB"] = torch.cuda.max_memory_allocated() >> 20
    return result


def profile_training(scale: Scale, model: str, batch_size: int) -> Pairs:
    """Yield the slowest kernels of an eager step, the number of launches, and the time of adaptive clipping."""
    from torch.profiler import ProfilerActivity, profile

    torch.backends.cudnn.benchmark = True
    name = scale.model(model)
    setting = Setting(name, scale.batch_size(batch_size), scale.pixels, scale.device, "bfloat16")
    step = training_step("fused", setting, scale)
    for _ in range(1 if scale.small else 3):
        step()
    synchronize(scale)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if scale.device == "cuda" else [])
    with profile(activities=activities) as profiled:
        step()
        synchronize(scale)
    time_of = "self_device_time_total" if scale.device == "cuda" else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: getattr(row, time_of), reverse=True)
    yield "launches", sum(row.count for row in rows if "LaunchKernel" in row.key)
    network = create_model(name).to(scale.device).to(memory_format=torch.channels_last)
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    yield "adaptive gradient clipping, ms", rounded(milliseconds(lambda: adaptive_clip_grad_(parameters), scale))
    for i, row in enumerate(rows[:40]):
        yield f"{i + 1}", {"ms": rounded(getattr(row, time_of) / 1e3), "calls": row.count, "kernel": row.key[:90]}


def bandwidth(scale: Scale, shapes: Sequence[tuple[int, int]]) -> Pairs:
    """Yield the bandwidth of elementwise operations in TB/s, for 256 images and several ``(channels, pixels)``.

    Only the tensors that an operation must read and write once are counted; additional traffic lowers the result.
    """
    n = scale.batch_size(256)
    for channels, pixels in shapes:
        norm = torch.rand(n, 1, pixels, pixels, device=scale.device) + 2
        sign, grad, x = (torch.randn(n, channels, pixels, pixels, device=scale.device) for _ in range(3))
        # If |out| = norm, the transform returns its input, so repeating it in place doesn't lead to zeros.
        values = (sign.sign() * norm, grad, x)
        out, grad, x = (v.bfloat16().contiguous(memory_format=torch.channels_last) for v in values)
        norm_layer = BatchNormUncentered2d(channels).to(scale.device).train()
        leaf = x.clone().requires_grad_()
        y = norm_layer(leaf)
        passes: dict[str, tuple[int, Callable[[], object]]] = {
            "batch norm": (3, partial(norm_layer, x)),
            "batch norm, backward": (5, partial(torch.autograd.grad, y, leaf, grad, True)),
        }
        for kind, kernels in kernel_sets(scale).items():
            passes |= {
                f"transform, {kind}": (2, partial(kernels.square, out.detach(), norm)),
                f"transform, backward, {kind}": (3, partial(kernels.square_backward, grad, out, norm, 1)),
                f"add_product, {kind}": (3, partial(kernels.add_product, grad, x, norm)),
            }
        for name, (moved, function) in passes.items():
            rate = moved * x.nbytes / milliseconds(function, scale) / 1e9
            yield f"{channels} x {pixels} x {pixels}, {name}", rounded(rate)


def kernel_sets(scale: Scale) -> dict[str, Kernels]:
    if scale.small:
        return {"eager": EAGER}
    from bcos_train.nn.fast.gpu_kernels import GPU  # requires Triton

    return {"eager": EAGER, "compiled": compiled_kernels(), "Triton": GPU}


def stem_channels(scale: Scale, batch_size: int) -> Pairs:
    """Compare ResNet's first convolution with 6 input channels and with 8 (two zero), as tensor cores prefer."""
    torch.backends.cudnn.benchmark = True
    n = scale.batch_size(batch_size)
    rgb = torch.randint(256, (n, 3, scale.pixels, scale.pixels), dtype=torch.uint8, device=scale.device)

    def encode(padding: int) -> Tensor:
        x = BcosEncoding().encode(rgb / 255)
        x = x if not padding else F.pad(x, (0, 0, 0, 0, 0, padding))
        return x.contiguous(memory_format=torch.channels_last).bfloat16()

    def forward_and_backward(convolution: nn.Module, x: Tensor, grad: Tensor) -> None:
        convolution(x).backward(grad)

    for padding in (0, 2):
        x = encode(padding)
        convolution = nn.Conv2d(x.shape[1], 64, 7, stride=2, padding=3, bias=False, device=scale.device).bfloat16()
        convolution.to(memory_format=torch.channels_last)
        grad = torch.randn_like(convolution(x))
        functions: dict[str, Callable[[], object]] = {
            "encoding, ms": partial(encode, padding),
            "forward, ms": partial(convolution, x),
            "and backward, ms": partial(forward_and_backward, convolution, x, grad),
        }
        times = {name: rounded(milliseconds(function, scale)) for name, function in functions.items()}
        yield f"{x.shape[1]} channels", times


# ---- explanations and a whole run


def grid_pointing(scale: Scale, n_grids: int) -> Pairs:
    """Yield the milliseconds per grid of 2x2 cells, also of the official procedure, and the difference of scores."""
    name = scale.model("resnet50")
    official = official_model(name).eval()
    ours: Any = create_model(name).eval()
    ours.load_state_dict(official.state_dict())
    official, ours = (model.to(scale.device).to(memory_format=torch.channels_last) for model in (official, ours))
    generator = torch.Generator().manual_seed(0)
    n_grids = 1 if scale.small else n_grids
    grids, targets = draw(n_grids, 2, scale.pixels, scale.device, generator, ours.num_classes)
    few = slice(4)

    def measured(function: Callable[..., Tensor], model: nn.Module, part: slice) -> float:
        call = lambda: function(model, grids[part], targets[part], 15)  # noqa: E731
        return rounded(milliseconds(call, scale, warm_up=1) / len(grids[part]))

    with cached_weights(ours):
        use_tf32(False)
        difference = our_scores(ours, grids[few], targets[few], 15) - official_scores(
            official, grids[few], targets[few], 15
        )
        yield "largest difference of scores", rounded(difference.abs().max().item())
        for tf32 in (False, True):
            use_tf32(tf32)
            suffix = f", TF32 {'on' if tf32 else 'off'}"
            yield f"ours{suffix}, ms per grid", measured(our_scores, ours, slice(None))
            yield f"official{suffix}, ms per grid", measured(official_scores, official, few)


def train_run(scale: Scale, seconds: float, overrides: Sequence[str]) -> Pairs:
    """Run ``train.py``; after ``seconds`` (not in a dry run), SIGTERM makes it save and exit."""
    with tempfile.TemporaryDirectory() as runs:
        log = Path(runs) / "log"
        command = [sys.executable, "train.py", f"runs={runs}", "trainer.progress=false", *overrides]
        command += ["limit_train=64", "limit_val=64", "num_workers=0"] if scale.small else []
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
            try:
                code = process.wait(None if scale.small else seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                code = process.wait()
        yield "exit code", code
        yield "seconds", rounded(time.perf_counter() - started)
        if code == 128 + signal.SIGTERM:
            yield "error", f"stopped after the limit of {seconds} s"
        elif code:
            yield "error", log.read_text()[-1500:]
        for path in Path(runs).rglob("metrics.csv"):
            yield "metrics.csv", path.read_text().splitlines()[-1]
