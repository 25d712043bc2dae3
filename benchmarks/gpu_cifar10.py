"""Train B-cos ResNet-20s with two norms on CIFAR-10 on one GPU in minutes: accuracy and explanation metrics.

    python benchmarks/gpu_cifar10.py pack cifar10-train.zip cifar10-test.zip data/cifar10.npz     # 60,000 JPEGs, 18 MB
    python benchmarks/gpu_cifar10.py run data/cifar10.npz              # on a machine with a GPU; needs no network
    python benchmarks/gpu_cifar10.py run --dry                         # on a CPU with noise images
    python benchmarks/gpu_cifar10.py unpack data/cifar10.npz data/cifar10       # to the image folder that `run` uses

The runs are those of `train.py model=resnet20 dataset=cifar10` with B = 1.25 and MaxOut 2. The norms train in parallel,
since such a small network leaves most of a GPU idle. Results are written as JSON and printed as a table. The published
figures are from a third-party rerun of the official code with batches of 64 (KTH, B-cos-v2-reproduction).
"""

import argparse
import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, check_writable, environment, positive, write
from PIL import Image

#: By norm: top-1 accuracy in percent, median of the grid pointing game (3x3).
PUBLISHED = {"bnu-linear": (90.82, 0.951), "bn": (90.74, 0.155)}
METRICS = {
    "epochs": "epoch",
    "top-1, %": "val/acc1",
    "GridPG, median": "explanation/grid_pointing/p50",
    "GridPG, mean": "explanation/grid_pointing",
    "grids": "explanation/grid_pointing/n_grids",
    "completeness error": "explanation/completeness",
    "alignment": "explanation/alignment",
}
FOLDER = re.compile(r"(train|test)/\w+")


def pack(archives: Sequence[Path], packed: Path) -> None:
    """Pack the JPEGs ``train/<class>/0000.jpg`` … and ``test/<class>/0000.jpg`` … into one small file.

    All files begin with the same tables, three fifths of their size, which are stored once. The rest is not compressed
    again.

    Raises:
        ValueError: The archives contain other names.
    """
    contents: dict[str, bytes] = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            contents |= {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    folders = sorted({name.rpartition("/")[0] for name in contents})
    counts = [sum(name.startswith(f"{folder}/") for name in contents) for folder in folders]
    if set(contents) != set(names_of(folders, counts)) or not all(map(FOLDER.fullmatch, folders)):
        raise ValueError("expected train/<class>/0000.jpg … and test/<class>/0000.jpg …, numbered without a gap")
    files = [contents[name] for name in names_of(folders, counts)]
    first, last = min(files), max(files)
    differing = (i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1)
    header = first[: next(differing, len(first))]
    np.savez(
        packed,
        folders=np.array(folders),
        counts=np.array(counts),
        header=np.frombuffer(header, np.uint8),
        sizes=np.array([len(file) - len(header) for file in files], np.uint32),
        bodies=np.frombuffer(b"".join(file[len(header) :] for file in files), np.uint8),
    )


def names_of(folders: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    for folder, count in zip(folders, counts, strict=True):
        yield from (f"{folder}/{i:04d}.jpg" for i in range(count))


def packed_files(packed: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names and the original contents of the packed files."""
    with np.load(packed, allow_pickle=False) as arrays:
        folders = arrays["folders"].tolist()
        header, bodies = arrays["header"].tobytes(), arrays["bodies"].tobytes()
        sizes, names = arrays["sizes"].tolist(), list(names_of(folders, arrays["counts"].tolist()))
    if not all(map(FOLDER.fullmatch, folders)):
        raise ValueError(f"{packed}: unexpected folders {folders}")
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, header + bodies[start : start + size]
        start += size


def unpack(packed: Path, folder: Path) -> None:
    """Write the image folder that ``dataset=cifar10`` reads."""
    folders = set()
    for name, content in packed_files(packed):
        path = folder / name
        if path.parent not in folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.add(path.parent)
        path.write_bytes(content)


def pack_noise(packed: Path, per_class: int) -> None:
    """Pack ``per_class`` noise images per class for training and testing, for dry runs without the data."""
    generator = np.random.default_rng(0)
    from bcos_train.dataset import Cifar10

    archive_path = packed.with_suffix(".zip")
    with zipfile.ZipFile(archive_path, "w") as archive:
        folders = [f"{part}/{name}" for part in ("train", "test") for name in Cifar10(packed.parent).class_names]
        for name in names_of(folders, [per_class] * len(folders)):
            image = io.BytesIO()
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(image, "JPEG")
            archive.writestr(name, image.getvalue())
    pack([archive_path], packed)


def command(norm: str, data: Path, runs: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the command of ``train.py``, without expensive evaluations between the first and the last epoch."""
    epochs = arguments.epochs
    overrides = {
        "dataset.root": data,
        "dataset.download": "false",
        "model.norm_layer": norm,
        "model.b": 1.25,
        "model.max_out": 2,
        "batch_size": arguments.batch_size,
        "runs": runs,
        "trainer.max_epochs": epochs,
        # The grid pointing game after the last epoch requires validation in that epoch.
        "trainer.val_every_n_epochs": 10 if epochs % 10 == 0 else epochs,
        "trainer.log_every_n_steps": 500,
        "trainer.progress": "false",
        "checkpointing.every_n_epochs": epochs,
        # Also halfway, in case the time limit stops the run.
        "explanation.every_n_epochs": epochs // 2 if epochs % 20 == 0 else epochs,
        "explanation.grid_pointing.n_grids": 250,
    }
    overrides["dataset.cache"] = "device"
    if not arguments.dry:
        overrides["trainer.compile"] = "true"
    settings = [f"{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "train.py", "model=resnet20", "dataset=cifar10", *settings, *arguments.overrides]


def train(commands: dict[str, list[str]], logs: Path, seconds: float) -> dict[str, tuple[int, float]]:
    """Run the commands in parallel and return exit code and seconds of each; after ``seconds``, SIGTERM stops them."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    started = time.monotonic()
    processes = {}
    for name, arguments in commands.items():
        with (logs / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(arguments, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
    ended: dict[str, tuple[int, float]] = {}
    is_stopping = False
    while len(ended) < len(processes):
        try:
            time.sleep(0.2)
        except KeyboardInterrupt:  # the trainings got it, too: their results until now are written
            seconds = min(seconds, time.monotonic() - started)
            is_stopping = True
        passed = time.monotonic() - started
        for name, process in processes.items():
            if name not in ended and process.poll() is not None:
                ended[name] = (process.returncode, passed)
            elif passed > seconds + 30:  # time to save is over
                process.kill()
        if passed > seconds and not is_stopping:
            is_stopping = True
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
    return ended


def final_metrics(runs: Path) -> dict[str, float | None]:
    """Return the last value of each of the `METRICS` of the only run in ``runs``; None if missing or not finite."""
    latest: dict[str, float] = {}
    for path in runs.glob("*/*/*/metrics.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                latest |= {key: float(text) for key, text in row.items() if text}
    values = {name: latest.get(key, math.nan) for name, key in METRICS.items()}
    values["epochs"] += 1  # the logged number counts from 0
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Format in Markdown, one row per norm."""
    columns = ["published top-1, %", "published GridPG, median", *METRICS, "minutes"]
    lines = [f"| norm | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]
    for norm, row in rows.items():
        cells = ["–" if row.get(key) is None else f"{row[key]:.4g}" for key in columns]
        lines.append(f"| `{norm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output or ROOT / f"benchmarks/results/gpu-cifar10{'-dry' if arguments.dry else ''}.json"
    check_writable(output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packed = arguments.packed
        if arguments.dry:
            packed = folder / "noise.npz"
            pack_noise(packed, per_class=2)
        started = time.monotonic()
        unpack(packed, folder / "data")
        print(f"unpacked in {time.monotonic() - started:.1f} s", flush=True)
        # A folder for each run, so that the metrics of another one are never taken for its own.
        runs = (arguments.runs or folder / "runs").resolve() / f"batch-{arguments.batch_size}-epochs-{arguments.epochs}"
        commands = {norm: command(norm, folder / "data", runs / norm, arguments) for norm in arguments.norms}
        ended = train(commands, folder, arguments.seconds - (time.monotonic() - started))
        rows: dict[str, dict[str, Any]] = {}
        for norm, (code, seconds) in ended.items():
            accuracy, grid_pointing = PUBLISHED.get(norm, (None, None))
            rows[norm] = {
                "published top-1, %": accuracy,
                "published GridPG, median": grid_pointing,
                **final_metrics(runs / norm),
                "minutes": round(seconds / 60, 2),
                "exit code": code,
                "command": " ".join(commands[norm][1:]),
            }
            if code:
                rows[norm]["log"] = (folder / f"{norm}.log").read_text()[-3000:]
    content = {"environment": environment("cpu" if arguments.dry else "cuda"), "results": rows}
    write(output, content)
    print(f"{table(rows)}\n\nwritten: {os.path.relpath(output)}")
    if failed := {norm: row["log"] for norm, row in rows.items() if row["exit code"]}:
        raise SystemExit("\n".join(f"{norm}:\n{log}" for norm, log in failed.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="pack zip files of image folders into one file")
    packing.add_argument("archives", type=Path, nargs="+")
    packing.add_argument("packed", type=Path)
    unpacking = commands.add_parser("unpack", help="unpack that file into an image folder")
    unpacking.add_argument("packed", type=Path)
    unpacking.add_argument("folder", type=Path)
    running = commands.add_parser("run", help="train, one run per norm")
    running.add_argument("packed", type=Path, nargs="?", help="written by pack")
    running.add_argument("--norms", nargs="+", default=list(PUBLISHED), help=f"default: {' '.join(PUBLISHED)}")
    running.add_argument("--epochs", type=positive, default=100)
    running.add_argument("--batch-size", type=positive, default=128, help="default: 128, half the published steps")
    running.add_argument("--seconds", type=positive, default=300, help="time limit for all runs (default: 300)")
    running.add_argument("--runs", type=Path, help="folder for the run folders (default: temporary)")
    running.add_argument("--dry", action="store_true", help="on a CPU with noise images")
    running.add_argument("--output", type=Path, help="JSON; default: benchmarks/results/gpu-cifar10[-dry].json")
    running.add_argument("--overrides", nargs="*", default=[], help="further overrides of train.py")
    arguments = parser.parse_args()
    if arguments.command == "run" and (arguments.packed is None) != arguments.dry:
        running.error("requires the packed file, or --dry")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.command == "pack":
        pack(arguments.archives, arguments.packed)
    elif arguments.command == "unpack":
        unpack(arguments.packed, arguments.folder)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
