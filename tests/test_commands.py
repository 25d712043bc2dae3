"""The installed commands ``bcos-train`` and ``bcos-evaluate``, and ``train.py`` and ``evaluate.py``."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: In place of torch: says that the imports have begun, which then take long.
SLOW = 'import time\nprint("importing", flush=True)\ntime.sleep(60)\n'


def test_the_installed_commands() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"bcos-{name}": f"bcos_train_commands:{name}" for name in ("train", "evaluate")}


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "from bcos_train_commands import train; train()"],
        ["-c", "from bcos_train_commands import evaluate; evaluate()"],
        ["train.py"],
        ["evaluate.py"],
    ],
    ids=["bcos-train", "bcos-evaluate", "train.py", "evaluate.py"],
)
def test_ctrl_c_during_the_imports_is_silent(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == ""
