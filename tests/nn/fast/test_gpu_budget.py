"""What a training step may read, write and launch on a GPU, counted without one at batch size 256."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("traffic")


@pytest.mark.parametrize(
    ("name", "ratio", "operations"),
    [
        ("resnet50", 1.25, 1000),
        ("densenet121", 1.1, 2800),
        ("simple_vit_s_patch16_224", 1.15, 1000),
    ],
)
def test_step(traffic: ModuleType, name: str, ratio: float, operations: int) -> None:
    """Bytes beside the standard network in eager mode, and operations, from the forward pass to the fused optimizer."""
    standard, ours = (traffic.count_step(prefix + name, 256) for prefix in ("standard_", ""))
    for step in (standard, ours):
        assert step["optimizer"].operations == {"_foreach_add_": 1, "_fused_adam_": 1}
    assert traffic.gigabytes(ours) <= ratio * traffic.gigabytes(standard)
    assert traffic.operations(ours) <= operations


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """Inductor fuses the norms and scales of B-cos blocks into as few passes as batch norms and ReLUs."""
    pytest.importorskip("triton")  # without it Inductor schedules nothing for a GPU
    script = BENCHMARKS / "lowered_traffic.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    standard, ours = (float(total) for total in re.findall(r"([\d.]+) GB \| [\d.]+ \|$", result.stdout, re.MULTILINE))
    assert ours <= 1.02 * standard
