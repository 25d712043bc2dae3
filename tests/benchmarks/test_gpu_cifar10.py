"""Packing and unpacking CIFAR-10, and running ``train.py``."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bcos_train.dataset import Cifar10

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(
    "BCOS_TEST_DATA" not in os.environ, reason="BCOS_TEST_DATA, the folder of the real images' zips, is not set"
)
def test_real_images_are_restored_byte_for_byte(benchmark: ModuleType, tmp_path: Path) -> None:
    contents = {}
    for part in ("train", "test"):
        with zipfile.ZipFile(Path(os.environ["BCOS_TEST_DATA"]) / f"cifar10-jpeg-{part}.zip") as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg") and int(Path(name).stem) < 20]
            contents |= {name: archive.read(name) for name in names}
    assert len(contents) == 400
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    benchmark.pack([tmp_path / "images.zip"], tmp_path / "images.npz")
    assert (tmp_path / "images.npz").stat().st_size < 0.4 * sum(map(len, contents.values()))
    assert dict(benchmark.packed_files(tmp_path / "images.npz")) == contents
    benchmark.unpack(tmp_path / "images.npz", tmp_path / "data")
    files = {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in (tmp_path / "data").rglob("*.jpg")}
    assert files == contents
    dataset = Cifar10(tmp_path / "data", download=False)
    assert [len(dataset.train()), len(dataset.val())] == [200, 200]  # type: ignore[arg-type]


def test_noise_is_restored_for_the_data_set(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.pack_noise(tmp_path / "noise.npz", per_class=3)
    benchmark.unpack(tmp_path / "noise.npz", tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "noise.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "data" / name).read_bytes() == archive.read(name)
    dataset = Cifar10(tmp_path / "data", download=False)
    assert [dataset.train()[i][1] for i in range(30)] == [k for k in range(10) for _ in range(3)]


@pytest.mark.parametrize("name", ["train/cat/0001.jpg", "train/cat/0000.png", "val/cat/0000.jpg", "../cat/0000.jpg"])
def test_other_names_are_rejected(benchmark: ModuleType, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match="numbered without a gap"):
        benchmark.pack([tmp_path / "images.zip"], tmp_path / "images.npz")


def test_a_packed_file_writes_into_no_other_folder(benchmark: ModuleType, tmp_path: Path) -> None:
    arrays = {"folders": ["../x"], "counts": [1], "sizes": [1]}
    bytes_ = {"header": np.zeros(1, np.uint8), "bodies": np.zeros(1, np.uint8)}
    np.savez(tmp_path / "x.npz", **{key: np.array(value) for key, value in arrays.items()}, **bytes_)
    with pytest.raises(ValueError, match="unexpected folders"):
        benchmark.unpack(tmp_path / "x.npz", tmp_path / "data")


def test_runs_are_stopped_in_time(benchmark: ModuleType, tmp_path: Path) -> None:
    commands = {
        "quick": [sys.executable, "-c", ""],
        "slow": [sys.executable, "-c", "import time; time.sleep(1000)"],
    }
    ended = benchmark.train(commands, tmp_path, seconds=2)
    assert ended["slow"][0] == -15
    assert 2 <= ended["slow"][1] < 30


def test_dry_run(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_cifar10.py"), "run", "--dry", "--epochs", "1", "--norms", "bn"]
    few = ["explanation.n_images=2", "explanation.gallery_images=0", "num_workers=0"]
    arguments = ["--batch-size", "10", "--seconds", "600", "--output", str(output), "--overrides", *few]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(output.read_text())["results"]["bn"]
    assert row["exit code"] == 0
    assert row["epochs"] == 1
    assert 0 <= row["top-1, %"] <= 100
    assert row["completeness error"] < 1e-5
    assert "| `bn` | 90.74 | 0.155 | 1 |" in done.stdout
