"""The benchmarks run and write their results; the measured values are not checked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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
    assert content["environment"]["torch"]


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


@pytest.mark.parametrize("benchmark", ["speed"], indirect=True)
def test_peak_memory_on_a_gpu_is_measured_in_this_process(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = {"now": 3 << 20, "peak": 0}

    def step() -> None:
        allocated["peak"] = max(allocated["peak"], 8 << 20)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])
    assert benchmark.allocated_peak(step) == 5


@pytest.mark.parametrize("benchmark", ["common"], indirect=True)
def test_works_without_git(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(benchmark.environment("cpu")["commit"]) == 40
    monkeypatch.setenv("PATH", "")
    assert benchmark.environment("cpu")["commit"] is None
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert benchmark.environment("cpu")["commit"] == "abc"


@pytest.mark.parametrize("benchmark", ["grid_pointing"], indirect=True)
@pytest.mark.parametrize("tolerance", [1e-4, 0.0])
def test_grid_pointing_writes_before_it_compares(
    benchmark: ModuleType, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.TOLERANCE, "cpu", tolerance)
    output = tmp_path / "x.json"
    arguments = ["--model", "resnet20", "--grids", "2", "--size", "16", "--smooth", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["grid_pointing.py", *arguments, "--output", str(output)])
    if tolerance:
        benchmark.main()
    else:
        with pytest.raises(SystemExit, match="the scores differ by"):
            benchmark.main()
    assert 0 < json.loads(output.read_text())["max_score_difference"] < 1e-4
