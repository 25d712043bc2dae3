"""OpenMP's waiting threads give way to other processes."""

import os
import subprocess
import sys

import pytest

# libgomp, the OpenMP of torch's wheels for Linux, prints what it uses when it is loaded.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch uses another OpenMP here")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(variables: dict[str, str], expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **variables}
    command = [sys.executable, "-c", "import bcos_train"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stderr
    lines = [line for line in shown.splitlines() if "GOMP_SPINCOUNT" in line]
    assert lines, "OpenMP printed no settings"
    assert all(f"'{expected}'" in line for line in lines)
