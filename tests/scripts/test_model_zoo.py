"""The command ``python scripts/model_zoo.py``."""

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bcos_train.weights import RECORDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "model_zoo.py"
ROW = "simple_vit_ti_patch16_224"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of two classes, and no training part."""
    generator = np.random.default_rng(0)
    for wnid in ("n01440764", "n02099601"):
        folder = tmp_path / "imagenet" / "val" / wnid
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "imagenet"


def content(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "model_zoo.json").read_text())["rows"]}


def test_from_images_to_the_table(images: Path, tmp_path: Path) -> None:
    """In processes of their own, as users start it: random weights, then again with nothing left to do."""
    out = tmp_path / "zoo"
    command = [sys.executable, str(SCRIPT), "--models", ROW, "--weights", "random", "--data", str(images)]
    command += ["--output", str(out), "--batch-size", "4", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    stamps = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500)
        assert result.returncode == 0, result.stderr
        stamps.append((out / "rows" / ROW / "evaluation.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    row = content(out)[ROW]
    assert (row["status"], row["images"], row["weights"]) == ("measured", 6, "random (seed 0)")
    assert not row["comparable"]
    assert row["top1"] is not None
    assert row["top1_difference"] is None
    assert row["images_per_second"] > 0
    assert row["params"] == RECORDS[ROW].params
    text = (out / "model_zoo.md").read_text()
    assert len(re.findall(r"\| \d+\.\d{3} \(not comparable\) \|", text)) == 2
    assert "not comparable |" in text
    (line,) = csv.DictReader((out / "model_zoo.csv").open(encoding="utf-8"))
    assert line["top1"] == str(row["top1"])


# ---- without evaluating


def test_without_imagenet(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--models", "resnet18", ROW, "--output", str(tmp_path)]) == 0
    rows = content(tmp_path)
    assert list(rows) == ["resnet18", ROW]
    assert {row["status"] for row in rows.values()} == {"no data"}
    assert [row["params"] for row in rows.values()] == [RECORDS[name].params for name in rows]
    assert [round(row["gmacs"], 2) for row in rows.values()] == [1.96, 1.28]
    assert "no data: give --data or set IMAGENET_PATH" in capsys.readouterr().err


def test_only_listed(script: ModuleType, images: Path, tmp_path: Path) -> None:
    assert script.main(["--models", ROW, "--data", str(images), "--no-eval", "--output", str(tmp_path)]) == 0
    assert content(tmp_path)[ROW]["status"] == "not evaluated"


def test_own_weights_that_are_missing(
    script: ModuleType,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of them: that is nothing. Some of them: whoever has trained a few rows need not name them."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("IMAGENET_PATH", str(images))
    result = {"acc1": 1.0, "acc5": 2.0, "count": 6, "seconds": 1.0, "dataset": "imagenet"}
    monkeypatch.setattr(script, "evaluate_row", lambda *args: result)
    arguments = ["--models", "resnet18", ROW, "--weights", str(own), "--output", str(tmp_path)]
    assert script.main(arguments) == 1
    assert {row["status"] for row in content(tmp_path).values()} == {"no weights"}
    missing = "no file resnet18.safetensors, .pth or .ckpt, no exported folder resnet18 and no run"
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"no weights for 2 of 2 rows; the first, resnet18: {own}: {missing}"
    (own / f"{ROW}.pth").touch()
    assert script.main(arguments) == 0
    assert {name: row["status"] for name, row in content(tmp_path).items()} == {
        "resnet18": "no weights",
        ROW: "measured",
    }
    assert capsys.readouterr().err.splitlines()[-1] == f"no weights for 1 of 2 rows; resnet18: {own}: {missing}"


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (None, 1)], ids=["interrupted", "a row failed"]
)
def test_exit_codes(
    raised: BaseException | None,
    code: int,
    script: ModuleType,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bcos_train.evaluation.zoo_rows import EvaluationFailed

    def evaluate(*args: Any) -> None:
        raise EvaluationFailed("no room") if raised is None else raised

    monkeypatch.setattr(script, "evaluate_row", evaluate)
    arguments = ["--models", ROW, "--weights", "random", "--data", str(images), "--output", str(tmp_path)]
    assert script.main(arguments) == code
    error = capsys.readouterr().err
    assert ("the same command resumes" if code == 130 else f"{ROW}: failed: no room") in error


def test_readme(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("11,693,120", "11,000,000"), encoding="utf-8")
    gmacs = {name: float(figure) for name, figure in re.findall(r"\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", text)}
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "model_cost", lambda name: (RECORDS[name].params, gmacs[name]))
    assert script.main(["--readme"]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_remaining_time(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a row of before and rows of 100 and 300 s, in the 50th second of the fourth of five."""
    now = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    with script.progress() as on_step:
        for done in range(5):
            on_step("counting", done, 5 - done)
        for done, begins in enumerate((10.0, 110.0, 410.0), 1):
            now[0] = begins
            on_step("row", done, 5 - done)
        now[0] = 460.0
    assert capsys.readouterr().err.splitlines()[-1].split()[-3:] == ["3/5", "0:05:50", "left"]


def test_nothing_is_left(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with script.progress() as on_step:
        on_step("counting", 0, 1)
        on_step("done", 1, 0)
    assert capsys.readouterr().err.splitlines()[-1].split()[-1] == "1/1"


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet5"], "--models resnet5: no row of the zoo matches; did you mean resnet50?"),
        (["--modles", "resnet50"], "--modles resnet50: no such option; did you mean --models?"),
        (["--weights", "none"], "--weights none: official, random or a folder, and this is not a folder"),
        (["--data", "/none"], "--data /none: no such folder"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--limit", "-1"], "--limit -1: at least 1"),
        (["--device", "gpus"], "--device: invalid choice: 'gpus'"),
        (["--train", "submit", "--gpus", "0"], "--gpus 0: at least 1"),
        (["--train", "submit", "--time", "0"], "--time 0: more than 0"),
        (["--set", "seed=2"], "--set seed=2: needs --train print or --train submit"),
        (["--train", "submit"], "--train submit: Slurm not found (no sbatch); --train print shows the commands"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(
    arguments: list[str],
    message: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    assert script.main([*arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- training


def test_commands_are_printed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--train", "print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"python train.py model={name} dataset=imagenet" for name in RECORDS]
    assert script.main(["--models", "resnet18", "--train", "print", "--set", "name=my run", "seed=2"]) == 0
    assert capsys.readouterr().out == "python train.py model=resnet18 dataset=imagenet 'name=my run' seed=2\n"


def mistakes(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert script.main([*arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


@pytest.mark.parametrize("mode", ["print", "submit"])
def test_settings_are_checked_before_anything_is_printed_or_submitted(
    mode: str, script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "submit", None)
    argv = ["foo=bar", "seeed=2", "oops", "recipe=lang", "seed=1,2", "model=resnet34"]
    lines = mistakes(script, capsys, "--models", "resnet18", "resnet34", "--train", mode, "--set", *argv)
    assert [line.partition(":")[0] for line in lines] == [
        *("--set foo", "--set seeed", "--set oops", "--set seed=1,2", "--set model=resnet34", "--set recipe=lang")
    ]
    assert lines[1] == "--set seeed: unknown key or config group; did you mean seed?"
    assert lines[3] == "--set seed=1,2: only one value; run the command once for each"
    assert lines[4] == "--set model=resnet34: set by --models"
    assert lines[5].startswith("--set recipe=lang: no such choice; did you mean long?")
    argv = ["seed=many", "model.inplanes=32", "optimizer.lrr=1"]  # inplanes: of ResNets alone
    lines = mistakes(script, capsys, "--models", "resnet18", ROW, "--train", mode, "--set", *argv)
    where = {line.partition(":")[0]: line.endswith(f" ({ROW})") for line in lines}
    assert where == {"--set seed=many": False, "--set model.inplanes=32": True, "--set optimizer.lrr=1": False}


def test_recipe_that_some_rows_do_not_take(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--train", "print", "--set", "recipe=long", "--models")
    (line,) = mistakes(script, capsys, *argv, "resnet18", ROW, f"standard_{ROW}")
    assert line.startswith("--set recipe=long: not for the models of these rows; it is for ")
    assert line.endswith(f" ({ROW} and standard_{ROW})")
    (line,) = mistakes(script, capsys, *argv, ROW)
    assert line.startswith(f"--set recipe=long: not for model={ROW}; it is for ")
    assert script.main([*argv, "resnet18"]) == 0
    assert capsys.readouterr().out == "python train.py model=resnet18 dataset=imagenet recipe=long\n"


def test_the_gpus_of_a_job_are_set_once(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "submit", None)
    argv = ("--models", "resnet18", "--set", "trainer.devices=2", "--train")
    assert mistakes(script, capsys, *argv, "submit") == ["--set trainer.devices=2: set by --gpus"]
    assert script.main([*argv, "print"]) == 0


def test_resources_of_a_job(script: ModuleType) -> None:
    options = script.SlurmOptions(gpus=2, cpus_per_gpu=6, hours=1.5, memory_gb=64, partition="long", account="me")
    assert options.parameters("resnet18") == {
        "name": "resnet18",
        "nodes": 1,
        "tasks_per_node": 1,
        "gpus_per_node": 2,
        "cpus_per_task": 12,
        "timeout_min": 90,
        "mem_gb": 64,
        "slurm_partition": "long",
        "slurm_account": "me",
    }
    assert not {"mem_gb", "slurm_partition", "slurm_account"} & set(script.SlurmOptions().parameters("resnet18"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put an ``sbatch`` with this behavior into PATH, and return the folder of its inputs."""

    def install(code: str) -> Path:
        commands, sent = tmp_path / "bin", tmp_path / "sent"
        commands.mkdir()
        sent.mkdir()
        (commands / "srun").write_text("#!/bin/sh\n")
        (commands / "sbatch").write_text(f"#!/bin/sh\nn=$(ls {sent} | wc -l)\ncp $1 {sent}/$n\n{code}\n")
        for command in commands.iterdir():
            command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        return sent

    return install


def test_jobs_are_submitted(
    slurm: Callable[[str], Path], script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = slurm('echo "Submitted batch job 10$n"')
    arguments = ["--models", "resnet18", "resnet34", "--train", "submit", "--gpus", "2", "--partition", "long"]
    assert script.main([*arguments, "--set", "seed=2", "--output", str(tmp_path / "zoo")]) == 0
    assert capsys.readouterr().out == "resnet18: job 100\nresnet34: job 101\n"
    text = (sent / "1").read_text()
    for line in ("job-name=resnet34", "gpus-per-node=2", "cpus-per-task=16", "time=4320", "partition=long"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text
    (pickled,) = (tmp_path / "zoo" / "slurm" / "resnet34").glob("*submitted.pkl")
    function = pickle.loads(pickled.read_bytes()).function
    expected = [str(ROOT / "train.py"), "model=resnet34", "dataset=imagenet", "trainer.devices=2", "seed=2"]
    assert function.command[1:] == expected
    assert Path(function.command[0]) == Path(sys.executable)
    assert Path(function.cwd) == tmp_path


def test_job_rejected_by_slurm(
    slurm: Callable[[str], Path], script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm('if [ $n -gt 0 ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi\necho "Submitted batch job 7"')
    arguments = ["--models", "resnet18", "resnet34", "--train", "submit", "--output", str(tmp_path / "zoo")]
    assert script.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "resnet18: job 7\n"
    # The lines before the last one are sbatch's own.
    assert output.err.splitlines()[-1] == "--train submit: resnet34: sbatch: error: invalid partition"
