"""What a training step may read, write and launch on a GPU, counted on the meta device at batch size 256."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("traffic")


@pytest.mark.parametrize(
    ("name", "ratio", "operations"),
    [
        ("resnet50", 1.25, 900),
        pytest.param("densenet121", 1.1, 2600, marks=pytest.mark.slow),
        pytest.param("simple_vit_s_patch16_224", 1.15, 1000, marks=pytest.mark.slow),
    ],
)
def test_step(traffic: ModuleType, name: str, ratio: float, operations: int) -> None:
    """Bytes beside the standard network in eager mode, and operations of the forward and the backward pass."""
    standard, ours = (traffic.count_step(prefix + name, 256) for prefix in ("standard_", ""))
    assert traffic.gigabytes(ours) <= ratio * traffic.gigabytes(standard)
    assert sum(ours[part].operations.total() for part in ("forward", "backward")) <= operations
