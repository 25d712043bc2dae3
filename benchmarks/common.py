"""Shared code of the benchmarks: official networks, command line, environment and output."""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


def official_model(name: str) -> nn.Module:
    """Build the official network of that name with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "resnet20":
            from bcos.models.resnet import cifar10_resnet20
            from bcos.modules import BcosConv2d, norms

            norm = norms.NoBias(norms.BatchNormUncentered2d)
            return cifar10_resnet20(norm_layer=norm, conv_layer=partial(BcosConv2d, b=2, max_out=2))
        from bcos.models import pretrained

        return getattr(pretrained, name)()


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value


def parser_for(name: str, description: str, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options for repeats, device, precision and output file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: by autocast")
    parser.add_argument("--output", type=Path, help=f"JSON; default: benchmarks/results/{name}-<device>-<dtype>.json")
    return parser


def use_tf32(enabled: bool) -> None:
    """Enable or disable TF32, float32 with a 10-bit mantissa, in convolutions and matrix products on CUDA."""
    torch.backends.cudnn.allow_tf32 = enabled
    torch.backends.cuda.matmul.allow_tf32 = enabled


def environment(device: str) -> dict[str, object]:
    """Return the machine, the versions and the commit."""
    from importlib.metadata import version
    from importlib.util import find_spec

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
        processor = next((name for name in names if "CPU" in name or "EPYC" in name or "Xeon" in name), processor)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "bcos") if find_spec(name)},
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of this checkout; without git, the value of ``BENCHMARK_COMMIT``."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return os.environ.get("BENCHMARK_COMMIT")
    return done.stdout.strip() or os.environ.get("BENCHMARK_COMMIT")


def resident_growth(step: Callable[[], None]) -> float:
    """Return the growth of this process's resident memory in MiB, at its peak during a step; on Linux."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)  # memory freed before wouldn't count
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    step()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """Return the resident memory of this process in MiB: VmRSS is the current, VmHWM the peak value."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def write(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON atomically; a missing folder is created."""
    from bcos_train.utils.atomic import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_writable(path: Path) -> None:
    """Exit with one line unless a file can be written at ``path``: before hours of work, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise SystemExit(f"--output {path}: can't write there ({error.strerror})") from error
