"""The benchmarks run and write what they say; what they measure is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, output: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--repeats", "1", "--device", "cpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


def test_speed(tmp_path: Path) -> None:
    variants = ("standard", "official", "fused")
    out, content = run(
        "speed.py", tmp_path / "x.json", "--models", "resnet20", "--batch-size", "2", "--variants", *variants
    )
    (result,) = content["results"]
    for task in ("train", "inference", "explain", "memory"):
        assert result[task].keys() == set(variants)
        assert all(value > 0 for value in result[task].values())
    assert "| resnet20 | train | fused |" in out
    assert content["surroundings"]["torch"]


@pytest.mark.slow
def test_speed_in_half_precision(tmp_path: Path) -> None:
    arguments = ("--models", "resnet20", "--batch-size", "2", "--variants", "standard", "fused", "--no-memory")
    _, content = run("speed.py", tmp_path / "x.json", *arguments, "--dtype", "bfloat16")
    assert content["dtype"] == "bfloat16"


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    arguments = ("--batch-sizes", "1", "--sizes", "32", "--models", "resnet18", "--variants", "standard", "fused")
    out, content = run("scaling.py", tmp_path / "x.json", *arguments)
    assert [result["varied"] for result in content["results"]] == ["batch", "resolution", "depth"]
    assert "| depth | resnet18, 8 x 224 px |" in out
