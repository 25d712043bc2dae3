"""The best compromises between classification and localization among the epochs of runs: a table and a figure.

python scripts/pareto_front.py runs/pasted/resnet20/default-…         # one run or several
python scripts/pareto_front.py RUN... --score val/acc1 --output front.png

The runs need explanation.metrics=[energy_pointing,iou] and a data set with boxes. Scores are rounded to 0.005 first.
Keep checkpoints with checkpointing.keep_best=…; the table says which epochs have one.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bcos_train.metric import pareto_front
from bcos_train.report import pareto_plot, save_gallery
from bcos_train.runs.layout import METRICS, checkpoints_by_epoch, read_metrics
from bcos_train.utils.command_line import MISTAKE, Parser
from bcos_train.utils.suggestions import suggest
from bcos_train.utils.terminal import print_line

LOCALIZATION = ("explanation/energy_pointing", "explanation/iou")
UNIFORM = "explanation/energy_pointing/uniform"
#: Scores of the classification, in percent: the first that a run has.
SCORES = ("val/f1", "val/acc1")


@dataclass(frozen=True)
class Point:
    """An epoch of a run. Scores are in [0, 1]: classification, energy pointing game, IoU, and that of a uniform map."""

    run: Path
    epoch: int
    scores: tuple[float, float, float]
    uniform: float
    checkpoint: Path | None


def parser() -> Parser:
    result = Parser(__doc__)
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    result.add_argument("--score", help="score of the classification (default: val/f1, else val/acc1)")
    result.add_argument("--resolution", type=float, default=0.005, help="scores are rounded to it (default: 0.005)")
    result.add_argument("--output", type=Path, help="figure (default: pareto_front.png in the first run folder)")
    return result


def read_points(run: Path, score: str | None) -> tuple[str, list[Point]]:
    """Return the name of the classification score, and a point for each epoch at which everything was measured."""
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{run}: no run folder, it has no {METRICS}")
    epochs: dict[int, dict[str, float]] = {}
    for row in read_metrics(path):
        epochs.setdefault(int(row.get("epoch", 0)), {}).update(row)
    columns = sorted({key for row in epochs.values() for key in row})
    name = score or next((key for key in SCORES if key in columns), SCORES[-1])
    for key in (name, *LOCALIZATION, UNIFORM):
        if key not in columns:
            raise ValueError(f"{run}: no {key} was logged{suggest(key, columns)}")
    checkpoints = checkpoints_by_epoch(run)
    points = []
    for epoch, row in sorted(epochs.items()):
        if all(key in row for key in (name, *LOCALIZATION, UNIFORM)):
            scores = (row[name] / 100, row[LOCALIZATION[0]], row[LOCALIZATION[1]])
            points.append(Point(run, epoch + 1, scores, row[UNIFORM], checkpoints.get(epoch + 1)))
    return name, points


def run(arguments: argparse.Namespace) -> int:
    names, points = set(), []
    for folder in arguments.runs:
        name, more = read_points(folder, arguments.score)
        names.add(name)
        points += more
    if len(names) > 1:
        raise ValueError(f"the runs have different scores, {' and '.join(sorted(names))}: choose one with --score")
    if not points:
        raise ValueError("no epoch has all scores: measure explanations after epochs with a validation")
    name = names.pop()
    front = pareto_front(torch.tensor([point.scores for point in points]), arguments.resolution)
    print(f"| run | epoch | {name} | energy pointing | IoU | uniform | checkpoint |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for point in (points[i] for i in front):
        numbers = " | ".join(f"{value:.3f}" for value in (*point.scores, point.uniform))
        print(f"| {point.run.name} | {point.epoch} | {numbers} | {point.checkpoint or '–'} |")
    columns = list(zip(*(point.scores for point in points), strict=True))
    figure = pareto_plot(
        columns[0],
        {"energy pointing game": columns[1], "IoU": columns[2]},
        [str(point.epoch) for point in points],
        front,
        runs=[point.run.name for point in points],
        title=f"{len(front)} of {len(points)} epochs are on the Pareto front, with numbers; dashed: a uniform map",
        axis=name,
        uniform=sum(point.uniform for point in points) / len(points),
    )
    output = arguments.output or arguments.runs[0] / "pareto_front.png"
    save_gallery(output, figure)
    print(f"\nfigure: {output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print_line(error)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
