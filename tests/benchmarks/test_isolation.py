"""Errors, hangs and exits of a measurement are reported as results."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Pairs = Iterator[tuple[str, Any]]


def fine(a: int, b: int) -> Pairs:
    yield "sum", a + b
    yield "process", os.getpid()


def failing() -> Pairs:
    yield "before", 1
    raise ValueError("no such thing")


def dying() -> Pairs:
    yield "before", 1
    os._exit(7)


def hanging() -> Pairs:
    yield "before", 1
    time.sleep(1000)


def preparing(ready: tuple[str, bool], marker: Path) -> Pairs:
    yield "prepared", True
    yield ready
    yield "proceeded after", marker.exists()


def test_results_come_from_another_process(benchmark: ModuleType) -> None:
    results = dict(benchmark.Isolated(fine, 1, 2).results(60))
    assert results.pop("process") != os.getpid()
    assert results == {"sum": 3}


def test_an_error_is_a_result(benchmark: ModuleType) -> None:
    results = dict(benchmark.Isolated(failing).results(60))
    assert results["before"] == 1
    assert results["error"] == "ValueError: no such thing"
    assert "raise ValueError" in results["traceback"]


def test_an_exit_is_a_result(benchmark: ModuleType) -> None:
    assert dict(benchmark.Isolated(dying).results(60)) == {
        "before": 1,
        "error": "the process ended with exit code 7",
    }


def test_a_hang_ends_in_time_and_keeps_earlier_results(benchmark: ModuleType) -> None:
    assert dict(benchmark.Isolated(hanging).results(0.5)) == {"before": 1, "error": "stopped after 0 s"}


def test_a_measurement_that_is_ready_waits_for_its_turn(benchmark: ModuleType, tmp_path: Path) -> None:
    process = benchmark.Isolated(preparing, benchmark.READY, tmp_path / "marker")
    results = dict(process.results(60, when_ready=(tmp_path / "marker").touch))
    assert results == {"prepared": True, "proceeded after": True}


def test_a_paused_process_does_nothing_until_it_is_resumed(benchmark: ModuleType) -> None:
    process = benchmark.Isolated(fine, 1, 2)
    process.pause()
    time.sleep(0.2)
    process.resume()
    assert dict(process.results(60))["sum"] == 3


@pytest.mark.parametrize("measure", [fine, hanging])
def test_kill_running_and_finished_processes(benchmark: ModuleType, measure: Any) -> None:
    process = benchmark.Isolated(measure, *((1, 2) if measure is fine else ()))
    process.kill()
    process.kill()
    assert "error" in dict(process.results(60))
