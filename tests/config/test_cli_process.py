"""Entry points in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toys

import bcos_train

# The package without what its __init__ imports, so that no process waits for torch.
SCRIPT = f"""
import sys, types
from pathlib import Path
package = types.ModuleType("bcos_train")
package.__path__ = [{str(Path(bcos_train.__file__).parent)!r}]
sys.modules["bcos_train"] = package
import toys
from bcos_train.config import UserError
from bcos_train.config.cli import entry_point

@entry_point(config_name="train", root=toys.train, config_dir=Path(__file__).parent / "configs")
def main(config):
    Path("seed" + str(config["seed"])).touch()
    print("seed", config["seed"], flush=True)
    if config["seed"] == 4:
        raise UserError("seed=4: not allowed")
    if config["seed"] == 5:
        raise RuntimeError("a fault")
    return config["seed"]

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(configs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    (tmp_path / "work").mkdir()
    return path


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    search = [str(Path(toys.__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), toys.ALLOW: "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, str(script), *arguments]
    work = script.parent / "work"
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_exit_code_and_output(script: Path) -> None:
    result = run(script, "seed=3")
    assert (result.returncode, result.stdout, result.stderr) == (3, "seed 3\n", "")
    assert [path.name for path in Path(script.parent, "work").iterdir()] == ["seed3"]


def test_a_mistake_is_one_line(script: Path) -> None:
    result = run(script, "model=resnet5")
    message = "model=resnet5: no such choice; did you mean resnet50? (choices: broken, net, resnet18 and resnet50)\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_a_bug_shows_its_traceback(script: Path) -> None:
    result = run(script, "seed=5")
    assert result.returncode == 1
    assert 'raise RuntimeError("a fault")' in result.stderr
    assert result.stderr.endswith("RuntimeError: a fault\n")


@pytest.mark.slow
def test_jobs_in_other_processes(script: Path) -> None:
    """A launcher runs the jobs; the first bad exit code comes back, the messages are in the jobs' logs."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    result = run(script, "-m", "seed=0,6,4", "hydra/launcher=submitit_local")
    assert (result.returncode, "Traceback" in result.stderr) == (6, False)
    work = script.parent / "work"
    assert {path.name for path in work.glob("seed*")} == {"seed0", "seed6", "seed4"}
    assert "seed=4: not allowed\n" in [path.read_text() for path in work.rglob("*_log.err")]
