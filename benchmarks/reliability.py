"""Run the campaigns of faults in tests/faults and write how many trials held: `python benchmarks/reliability.py`.

Options are passed to pytest; without `-m`, all trials are run, which takes an hour on a CPU core.
"""

import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
from common import commit

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "reliability.md"
TEXT = """# Reliability

What runs survive: each trial of a campaign in [tests/faults](../tests/faults) lets something go wrong in a small run
and starts it again. It held if the exit code was right, there was at most a short message instead of a traceback, and
the run then ended bit for bit as one that nothing befell: weights, optimizer, metrics, summary and the files in its
folder, without temporary ones.

| campaign | tried | held |
| --- | ---: | ---: |
{rows}

    {command}

Commit {commit}. `make test` runs every tenth trial, `make test-all` runs all of them.
"""


class Counts:
    """A pytest plugin that adds up the trials of each test."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        campaign = report.nodeid.partition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        file = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")
        for name, value in report.user_properties:
            if name in ("tried", "held"):
                getattr(self, name)[f"{file}: {campaign}"] += int(str(value))


def main() -> int:
    """Run the campaigns, write the table, and return pytest's exit code."""
    counts, options = Counts(), sys.argv[1:]
    marks = [] if "-m" in options else ["-m", ""]
    code = pytest.main([*marks, *options, str(ROOT / "tests" / "faults")], plugins=[counts])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)  # interrupted, for example: the table would lack trials
    rows = "\n".join(f"| {name} | {counts.tried[name]} | {counts.held[name]} |" for name in counts.tried)
    command = shlex.join(["python", "benchmarks/reliability.py", *options])
    OUTPUT.write_text(TEXT.format(rows=rows, command=command, commit=commit()), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
