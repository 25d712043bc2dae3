"""The Model Zoo table: evaluate its rows, list them, or train them.

python scripts/model_zoo.py                                       # official weights on IMAGENET_PATH
python scripts/model_zoo.py --models 'resnet*' --weights runs     # your own, of the runs in a folder or of files
python scripts/model_zoo.py --no-eval                             # parameters and GMACs alone
python scripts/model_zoo.py --train print                         # how to train each row; submit: to Slurm
"""

import argparse
import datetime
import inspect
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bcos_train.command_line import INTERRUPTED, MISTAKE, Parser
from bcos_train.evaluation.slurm import SlurmOptions, submit
from bcos_train.evaluation.zoo_rows import Settings, evaluate_row, is_complete, measure, problems
from bcos_train.report.zoo_table import choose, listed, readme_with, size, train_command
from bcos_train.suggest import join_words

ROOT = Path(__file__).resolve().parents[1]


def parser() -> Parser:
    result = Parser(__doc__)
    add = result.add_argument
    add("--models", nargs="+", default=[], metavar="PATTERN", help="rows, such as 'resnet*'; all without it")
    add("--weights", default="official", help="official (default), random, or a folder of your own weights or runs")
    add("--data", type=Path, help="the folder that holds ImageNet's val/ (default: $IMAGENET_PATH)")
    add(
        "--output", type=Path, default=Path("evaluations/zoo"), help="folder for all results (default: evaluations/zoo)"
    )
    add("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    add("--limit", type=int, help="evaluate this many images; the accuracies are then not comparable")
    add("--device", default="auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    add("--no-eval", action="store_true", help="list the rows without evaluating them")
    add("--readme", action="store_true", help="write the table of README.md anew, and nothing else")
    train = result.add_argument_group("training")
    train.add_argument("--train", choices=("print", "submit"), help="print or submit each row's training, and no more")
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    train.add_argument("--gpus", type=int, default=4, help="of each job, on one machine (default: 4)")
    train.add_argument("--cpus-per-gpu", type=int, default=8, help="(default: 8)")
    train.add_argument("--time", type=float, default=72, metavar="HOURS", help="time limit of a job (default: 72)")
    train.add_argument("--memory", type=float, metavar="GB", help="memory of a job")
    train.add_argument("--partition")
    train.add_argument("--account")
    return result


def run(arguments: argparse.Namespace) -> int:
    names = choose(arguments.models)
    if arguments.readme:
        path = ROOT / "README.md"
        rows = [listed(name, *size(name)) for name in choose([])]
        path.write_text(readme_with(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
        print(f"written: {path}")
        return 0
    if arguments.train is not None:
        return train(arguments, names)
    if arguments.set:
        raise ValueError(f"--set {arguments.set[0]}: goes with --train print or --train submit")
    data = arguments.data or os.environ.get("IMAGENET_PATH") or None
    settings = Settings(
        weights=arguments.weights,
        data=None if arguments.no_eval or data is None else Path(data),
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        device=arguments.device,
    )
    evaluate = None if arguments.no_eval else partial(evaluate_row, ROOT / "evaluate.py")
    try:
        with progress() as on_step:
            rows = measure(names, settings, arguments.output, evaluate, on_step)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the row that was not finished", file=sys.stderr)
        return INTERRUPTED
    if evaluate is not None and data is None:
        print("no data: give --data or set IMAGENET_PATH to the folder that holds val/", file=sys.stderr)
    print(f"written: {arguments.output}/model_zoo.md, .csv and .json")
    for line in problems(rows):
        print(line, file=sys.stderr)
    return 0 if is_complete(rows, settings.weights) else 1


def train(arguments: argparse.Namespace, names: list[str]) -> int:
    options = SlurmOptions(
        gpus=arguments.gpus,
        cpus_per_gpu=arguments.cpus_per_gpu,
        hours=arguments.time,
        memory_gb=arguments.memory,
        partition=arguments.partition,
        account=arguments.account,
    )
    # A job has its processes from what it asks of Slurm.
    check_settings(arguments.set, names, {"trainer.devices": "--gpus"} if arguments.train == "submit" else {})
    if arguments.train == "print":
        for name in names:
            print(shlex.join(["python", *train_command(name), *arguments.set]))
        return 0
    for name, job in submit(names, options, ROOT, arguments.output / "slurm", arguments.set):
        print(f"{name}: job {job}")
    return 0


def check_settings(settings: Sequence[str], names: Sequence[str], taken: Mapping[str, str]) -> None:
    """Compose the config of each row with these settings.

    Args:
        settings: Of ``--set``.
        names: The rows.
        taken: Keys that an option of this script sets.

    Raises:
        ValueError: A line for each mistake, with the rows if it isn't one for all of them.
    """
    if not settings:
        return
    # Not before now: Lightning alone takes seconds to import.
    from bcos_train.config import Problem, UserError, check
    from bcos_train.config.compose import Composer
    from bcos_train.config.overrides import check_choices, read_overrides
    from bcos_train.run import TrainConfig

    composer = Composer(ROOT / "configs")
    top_level = inspect.signature(TrainConfig).parameters
    written, found = read_overrides(settings, composer, top_level, lambda: composer.compose("train"))
    for text in written:
        override, value = composer.parse(text), text.partition("=")[2]
        if option := ({"model": "--models"} | dict(taken)).get(override.key_or_group):
            found.append(Problem(override.key_or_group, f"{option} chooses that", value))
        elif override.is_sweep_override():
            found.append(Problem(override.key_or_group, "one value; give the command once for each", value))
    found += check_choices(written.values(), composer, may_sweep=True)
    rows: dict[str, list[str]] = {str(problem): list(names) for problem in found}
    for name in names if not found else ():
        try:
            config = composer.compose("train", [*train_command(name)[1:], *written.values()])
            problems_here = list(map(str, check(config, root=TrainConfig)))
        except UserError as error:
            problems_here = str(error).splitlines()
        for text in problems_here:
            if len(names) > 1:  # a recipe that isn't for a model names it: one line for all of these
                text = text.replace(f"model={name};", "the models of these rows;")
            rows.setdefault(text, []).append(name)
    if rows:
        of = {
            text: "" if len(those) == len(names) else f" ({join_words(those, 'and', 3)})"
            for text, those in rows.items()
        }
        raise ValueError("\n".join(f"--set {text}{of[text]}" for text in rows))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line with the row that is being measured, and how long the others will take at the pace so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    begun: dict[int, float] = {}  # when the row of this number began

    class Remaining(ProgressColumn):
        """rich's own estimate forgets what was more than 30 s ago, and ignores the first row."""

        def render(self, task: Task) -> Text:
            done = int(task.completed)
            if task.total == done:
                return Text("")
            first = min(begun, default=done)
            if done == first:
                return Text("-:-- left")
            left = (begun[done] - begun[first]) / (done - first) * (task.total - done) - (
                time.monotonic() - begun[done]
            )
            return Text(f"{datetime.timedelta(seconds=max(round(left), 0))} left")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("", total=None, visible=False)

        def on_step(text: str, done: int, left: int) -> None:
            if done <= max(begun, default=-1):  # another pass over the rows
                begun.clear()
            begun.setdefault(done, time.monotonic())
            display.update(task, description=text, completed=done, total=done + left, visible=True)

        yield on_step


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print(error, file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
