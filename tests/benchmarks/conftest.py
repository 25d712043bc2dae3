import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark that the test module is named after, or that of the parameter."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    name = getattr(request, "param", request.module.__name__.rpartition(".")[2].removeprefix("test_"))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
