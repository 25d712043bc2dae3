"""Students of CIFAR-10 with a few images per class, trained on labels, or by a teacher with KD or e2KD.

    python benchmarks/few_shots.py --teacher runs/cifar10/resnet20/… --root data

Trains each student with train.py, evaluates it on all test images, and writes a table; started again, it continues. The
arm ``e2kd-constants`` is the ablation of benchmarks/detached_scales.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ROOT, check_writable, environment, positive, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bcos_train import load
from bcos_train.augmentation import plain
from bcos_train.dataset import BcosEncoding, Cifar10
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.encoding import to_float
from bcos_train.distillation import explain_by, explanation_similarity

ABLATION = "e2kd-constants"
ARMS = ("labels", "kd", "e2kd", ABLATION)
#: Heading and number of decimals.
COLUMNS = {
    "accuracy": ("accuracy %", 1),
    "agreement": ("agreement %", 1),
    "similarity": ("explanation similarity", 3),
    "grid_pointing": ("grid pointing", 3),
}
N_EXPLAINED = 1000


def objective(arm: str, teacher: Path, weight: float) -> list[str]:
    """Return the overrides of an arm."""
    if arm == "labels":
        return []
    if arm == "kd":
        return ["distillation=kd", f"distillation.teacher={teacher}"]
    explained = ["distillation=e2kd", f"distillation.teacher={teacher}", f"distillation.explanation_weight={weight}"]
    return [*explained, *(["plugins=[detached_scales]"] if arm == ABLATION else [])]


def run(script: str, *overrides: str) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / script), *overrides]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def grid_pointing(folder: Path, *overrides: str) -> float:
    """Return the mean score on 3 x 3 grids, of correctly classified images with any confidence."""
    settings = {"metrics": "[grid_pointing]", "grid_pointing.threshold": 0, "grid_pointing.n_grids": 200}
    run(
        "evaluate.py",
        f"run={folder}",
        *overrides,
        "explanation=default",
        *(f"explanation.{key}={value}" for key, value in settings.items()),
    )
    found = json.loads((folder / "explanations.json").read_text())["metrics"]["grid_pointing"]["methods"]["bcos"]
    return float(found.get("mean", "nan"))  # none if too few images are classified correctly


class Judge:
    """Compares students with the teacher on all test images, and explanations on the first of them."""

    def __init__(self, teacher: nn.Module, root: Path) -> None:
        #: Images, labels (N,), the teacher's logits (N, K) and W(x), of the first images only.
        self.batches: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        for batch in DataModule(Cifar10(root), plain(), plain(), batch_size=250).val_dataloader():
            x = BcosEncoding().encode(to_float(batch.images))
            if len(self.batches) * 250 < N_EXPLAINED:
                logits, weights = explain_by("weights", teacher, x)
            else:
                logits, weights = predict(teacher, x), None
            self.batches.append((x, batch.labels, logits, weights))

    def compare(self, student: nn.Module) -> dict[str, float]:
        correct, agreed, similarities = [], [], []
        for x, labels, expected, theirs in self.batches:
            if theirs is None:
                logits = predict(student, x)
            else:
                logits, ours = explain_by("weights", student, x, expected.argmax(1))
                similarities.append(explanation_similarity(ours, theirs))
            correct.append(logits.argmax(1) == labels)
            agreed.append(logits.argmax(1) == expected.argmax(1))
        return {
            "accuracy": 100 * float(torch.cat(correct).float().mean()),
            "agreement": 100 * float(torch.cat(agreed).float().mean()),
            "similarity": float(torch.cat(similarities).mean()),
        }


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def measure(arm: str, seed: int, arguments: argparse.Namespace, judge: Judge) -> dict[str, float]:
    """Train and evaluate one student."""
    settings = {
        "model": "resnet20",
        "model.max_out": 1,
        "dataset": "cifar10",
        "dataset.root": arguments.root,
        "dataset.cache": "device",
        "dataset.shots": arguments.shots,
        "dataset.split_seed": seed,
        "seed": seed,
        "batch_size": 32,
        "trainer.max_epochs": arguments.epochs,
        "trainer.val_every_n_epochs": arguments.epochs,
        "explanation": "none",
        "name": arm,
        "runs": arguments.runs,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    run("train.py", *overrides, *objective(arm, arguments.teacher, arguments.weight))
    (folder,) = (
        path.parent
        for path in arguments.runs.glob(f"cifar10/resnet20/{arm}-????????/summary.json")
        if f"\nseed: {seed}\n" in (path.parent / "config.yaml").read_text()
    )
    record = folder / "few_shots.json"
    if not record.exists():
        plugin = ["plugins=[detached_scales]"] if arm == ABLATION else []
        found = judge.compare(load(folder).model.eval())
        write(record, {**found, "grid_pointing": grid_pointing(folder, *plugin)})
    measured: dict[str, float] = json.loads(record.read_text())
    return measured


def spread(values: Sequence[float], decimals: int) -> str:
    """Return the mean and the standard deviation over the seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.{decimals}f}" + (f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="run folder of a B-cos network on CIFAR-10")
    parser.add_argument("--root", type=Path, required=True, help="as dataset.root for dataset=cifar10")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_shots"), help="folder of the students' runs")
    parser.add_argument("--shots", type=positive, default=50, help="images per class")
    parser.add_argument("--epochs", type=positive, default=60)
    parser.add_argument("--weight", type=float, default=1.0, help="of the explanations")
    parser.add_argument("--seeds", type=positive, nargs="+", default=[1, 2, 3], help="of the draw and of the training")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/few-shots-cpu.json")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    arguments.teacher, arguments.root = arguments.teacher.absolute(), arguments.root.absolute()
    teacher = load(arguments.teacher).model.eval()
    judge = Judge(teacher, arguments.root)
    teachers = {**judge.compare(teacher), "grid_pointing": grid_pointing(arguments.teacher)}
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            results[arm].append(measure(arm, seed, arguments, judge))
            settings = {key: getattr(arguments, key) for key in ("shots", "epochs", "weight", "seeds")}
            write(
                arguments.output,
                {"environment": environment("cpu"), **settings, "teacher": teachers, "students": results},
            )
    table = Table("trained on", *(heading for heading, _ in COLUMNS.values()))
    for arm, found in results.items():
        cells = [spread([seed[key] for seed in found], decimals) for key, (_, decimals) in COLUMNS.items()]
        table.add_row(arm, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
