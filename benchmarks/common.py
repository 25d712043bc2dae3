"""What the benchmarks share: the package of this checkout, the official networks, and where they ran."""

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


def official_twin(name: str) -> nn.Module:
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
    """For argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value


def parser_for(name: str, description: str, repeats: int) -> argparse.ArgumentParser:
    """How often, where and in which precision to measure, and where to write it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: by autocast")
    parser.add_argument("--output", type=Path, help=f"JSON; default: benchmarks/results/{name}-<device>-<dtype>.json")
    return parser


def use_tf32(enabled: bool) -> None:
    """Allow or forbid TF32, float32 with ten bits of mantissa, in convolutions and matrix products on CUDA."""
    torch.backends.cudnn.allow_tf32 = enabled
    torch.backends.cuda.matmul.allow_tf32 = enabled


def surroundings(device: str) -> dict[str, Any]:
    """Machine, versions and commit."""
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
    """Commit of this checkout; where there is no git, what ``BENCHMARK_COMMIT`` says."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return os.environ.get("BENCHMARK_COMMIT")
    return done.stdout.strip() or os.environ.get("BENCHMARK_COMMIT")


def write(path: Path, content: Any) -> None:
    """Write JSON, replacing the file as a whole; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
