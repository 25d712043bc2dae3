"""The GPU check on a CPU with tiny sizes, and its report of failures."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("bcos_train.nn.fast")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_dry_run(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    steps = ["parity resnet18", "resnet50 eager", "resnet50 compiled", "profile", "bandwidth", "stem", "grid pointing"]
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry", "--output", str(output), "--steps", *steps]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    assert list(content) == ["card", *steps]
    assert not [name for name, result in content.items() if "error" in result]
    assert content["parity resnet18"]["float32 is accurate"] is True
    assert content["parity resnet18"]["completeness error, TF32 off"] < 1e-5
    assert content["resnet50 eager"].keys() > {"standard", "fused", "official channels_last"}
    assert content["resnet50 compiled"]["whole"]["images/s"] > 0
    assert content["grid pointing"]["largest difference of scores"] < 1e-4
    assert output.with_suffix(".md").read_text() in done.stdout


def test_stops_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "card: " in done.stderr
    assert list(json.loads(output.read_text())) == ["card"]


def test_a_step_without_time_is_skipped(benchmark: ModuleType, tmp_path: Path) -> None:
    check = benchmark.Check(tmp_path / "x.json", seconds=10, dry=False)
    check._step("resnet50 eager")
    assert check.results == {"resnet50 eager": {"skipped": "10 s were left"}}


def test_failures(benchmark: ModuleType) -> None:
    results = {
        "card": {"cores": 2},
        "parity resnet18": {"float32 is accurate": True, "bfloat16 is accurate": False},
        "resnet50 eager": {"standard": {"images/s": 1.0}, "fused": {"error": "out of memory"}},
        "stem": {"error": "stopped after 20 s"},
    }
    assert benchmark.failures(results) == [
        "parity resnet18: bfloat16 is accurate: no",
        "resnet50 eager, fused: out of memory",
        "stem: stopped after 20 s",
    ]


def test_throughputs_are_compared_over_steps(benchmark: ModuleType) -> None:
    results = {
        "resnet50 eager": {"standard": {"images/s": 100.0}, "fused": {"images/s": 80.0}, "took, s": 9},
        "resnet50 standard compiled": {"standard whole": {"images/s": 125.0}},
        "resnet50 compiled": {"whole": {"images/s": 150.0}},
        "stem": {"6 channels": {"forward, ms": 1.0}},
    }
    report = benchmark.report(results)
    assert "| variant | images/s | x standard | x standard whole |" in report
    assert "| fused | 80.0 | 0.8 | 0.64 |" in report
    assert "| whole | 150.0 | 1.5 | 1.2 |" in report
    assert "| 6 channels | 1.0 |" in report
