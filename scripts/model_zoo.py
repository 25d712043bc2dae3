"""The Model Zoo table: evaluate its rows, list them, or train them.

python scripts/model_zoo.py                                       # official weights on IMAGENET_PATH
python scripts/model_zoo.py --models 'resnet*' --weights runs     # your weights: a folder of runs or of files
python scripts/model_zoo.py --no-eval                             # parameters and GMACs only
python scripts/model_zoo.py --train print                         # training commands; submit: Slurm jobs
"""

import argparse
import datetime
import inspect
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bcos_train.evaluation.zoo_rows import Settings, evaluate_row, evaluate_rows, is_complete, summarize_failures
from bcos_train.report.zoo_table import model_cost, published_row, select_rows, train_command, update_readme
from bcos_train.utils.command_line import INTERRUPTED, MISTAKE, Parser
from bcos_train.utils.suggestions import join_words
from bcos_train.utils.terminal import print_line

ROOT = Path(__file__).resolve().parents[1]


def parser() -> Parser:
    result = Parser(__doc__)
    add = result.add_argument
    add("--models", nargs="+", default=[], metavar="PATTERN", help="rows, such as 'resnet*' (default: all)")
    add("--weights", default="official", help="official (default), random, or a folder of your own weights or runs")
    add("--data", type=Path, help="the folder that holds ImageNet's val/ (default: $IMAGENET_PATH)")
    add(
        "--output", type=Path, default=Path("evaluations/zoo"), help="folder for all results (default: evaluations/zoo)"
    )
    add("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    add("--limit", type=int, help="evaluate this many images; the accuracies are then not comparable")
    add("--device", default="auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    add("--no-eval", action="store_true", help="list the rows without evaluating them")
    add("--readme", action="store_true", help="rewrite the table of README.md, and nothing else")
    train = result.add_argument_group("training")
    train.add_argument("--train", choices=("print", "submit"), help="only print or submit each row's training command")
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    train.add_argument("--gpus", type=int, default=4, help="GPUs of each job, on one machine (default: 4)")
    train.add_argument("--cpus-per-gpu", type=int, default=8, help="CPU cores per GPU (default: 8)")
    train.add_argument("--time", type=float, default=72, metavar="HOURS", help="time limit of a job (default: 72)")
    train.add_argument("--memory", type=float, metavar="GB", help="memory of a job")
    train.add_argument("--partition")
    train.add_argument("--account")
    return result


def run(arguments: argparse.Namespace) -> int:
    names = select_rows(arguments.models)
    if arguments.readme:
        path = ROOT / "README.md"
        rows = [published_row(name, *model_cost(name)) for name in select_rows([])]
        path.write_text(update_readme(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
        print(f"written: {path}")
        return 0
    if arguments.train is not None:
        return train(arguments, names)
    if arguments.set:
        raise ValueError(f"--set {arguments.set[0]}: needs --train print or --train submit")
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
            rows = evaluate_rows(names, settings, arguments.output, evaluate, on_step)
    except KeyboardInterrupt:
        print("stopped; the same command resumes with the unfinished row", file=sys.stderr)
        return INTERRUPTED
    if evaluate is not None and data is None:
        print("no data: give --data or set IMAGENET_PATH to the folder that holds val/", file=sys.stderr)
    print(f"written: {arguments.output}/model_zoo.md, .csv and .json")
    for line in summarize_failures(rows):
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
    # The number of processes of a job follows from its GPUs.
    check_settings(arguments.set, names, {"trainer.devices": "--gpus"} if arguments.train == "submit" else {})
    if arguments.train == "print":
        for name in names:
            print(shlex.join(["python", *train_command(name), *arguments.set]))
        return 0
    for name, job in submit(names, options, ROOT, arguments.output / "slurm", arguments.set):
        print(f"{name}: job {job}")
    return 0


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Resources of each job. It has one task, which starts a process for each GPU itself.

    Args:
        gpus: GPUs, on one machine.
        cpus_per_gpu: Cores per GPU.
        hours: Time limit. A job that reached it resumes when it is submitted again.
        memory_gb: Memory; ``None``: the cluster's default.
        partition, account: ``None``: the cluster's default.

    Raises:
        ValueError: A number is below 1, or a limit is not positive.
    """

    gpus: int = 4
    cpus_per_gpu: int = 8
    hours: float = 72
    memory_gb: float | None = None
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for option, value in {"--gpus": self.gpus, "--cpus-per-gpu": self.cpus_per_gpu}.items():
            if value < 1:
                raise ValueError(f"{option} {value}: at least 1")
        for option, number in {"--time": self.hours, "--memory": self.memory_gb}.items():
            if number is not None and number <= 0:
                raise ValueError(f"{option} {number:g}: more than 0")

    def parameters(self, name: str) -> dict[str, object]:
        """Return the arguments of ``submitit.AutoExecutor.update_parameters``."""
        parameters = {
            "name": name,
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.gpus * self.cpus_per_gpu,
            "timeout_min": max(round(self.hours * 60), 1),
            "mem_gb": self.memory_gb,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
        }
        return {key: value for key, value in parameters.items() if value is not None}


def job_command(name: str, root: Path, gpus: int, settings: Sequence[str]) -> list[str]:
    """Return the command of a job.

    Args:
        name: Model name.
        root: Folder of ``train.py``.
        gpus: Number of processes.
        settings: Further settings of ``train.py``.
    """
    script, *recipe = train_command(name)
    return [sys.executable, str(root / script), *recipe, f"trainer.devices={gpus}", *settings]


def submit(
    names: Sequence[str], options: SlurmOptions, root: Path, log_folder: Path, settings: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Submit a job for each row, which runs in the current folder, and yield model names and job numbers.

    Args:
        names: Model names.
        options: Resources of each job.
        root: Folder of ``train.py``.
        log_folder: Folder for each row's job script and output.
        settings: Further settings of ``train.py``.

    Raises:
        ValueError: Slurm is not available, or it rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--train submit: Slurm not found (no sbatch); --train print shows the commands")
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError as error:
        raise ValueError(f"--train submit needs submitit: pip install submitit ({error})") from error
    for name in names:
        command = submitit.helpers.CommandFunction(job_command(name, root, options.gpus, settings), cwd=Path.cwd())
        try:
            executor = submitit.AutoExecutor(folder=log_folder / name, cluster="slurm")
            executor.update_parameters(**options.parameters(name))
            yield name, executor.submit(command).job_id
        except (FailedJobError, RuntimeError) as error:
            raise ValueError(f"--train submit: {name}: {' '.join(str(error).split())}") from error


def check_settings(settings: Sequence[str], names: Sequence[str], reserved: Mapping[str, str]) -> None:
    """Compose and validate the config of each row with these settings.

    Args:
        settings: Values of ``--set``.
        names: Rows.
        reserved: Keys that an option of this script sets -> that option.

    Raises:
        ValueError: One line per problem, with the affected rows unless all are affected.
    """
    if not settings:
        return
    # Imported here: Lightning alone takes seconds.
    from bcos_train.config import Problem, UserError, check
    from bcos_train.config.composition import Composer
    from bcos_train.config.overrides import check_choices, read_overrides
    from bcos_train.training.config import TrainConfig

    composer = Composer(ROOT / "configs")
    top_level = inspect.signature(TrainConfig).parameters
    rewritten, problems = read_overrides(settings, composer, top_level, lambda: composer.defaults("train"))
    for text in rewritten:
        override, value = composer.parse(text), text.partition("=")[2]
        if option := ({"model": "--models"} | dict(reserved)).get(override.key_or_group):
            problems.append(Problem(override.key_or_group, f"set by {option}", value))
        elif override.is_sweep_override():
            problems.append(Problem(override.key_or_group, "only one value; run the command once for each", value))
    problems += check_choices(rewritten.values(), composer, lambda: composer.defaults("train"))
    rows: dict[str, list[str]] = {str(problem): list(names) for problem in problems}
    for name in names if not problems else ():
        try:
            config = composer.compose("train", [*train_command(name)[1:], *rewritten.values()])
            messages = list(map(str, check(config, root=TrainConfig)))
        except UserError as error:
            messages = str(error).splitlines()
        for text in messages:
            if len(names) > 1:  # without the model's name, these rows share one line
                text = text.replace(f"model={name};", "the models of these rows;")
            rows.setdefault(text, []).append(name)
    if rows:
        lines = []
        for text, affected in rows.items():
            suffix = "" if len(affected) == len(names) else f" ({join_words(affected, 'and', 3)})"
            lines.append(f"--set {text}{suffix}")
        raise ValueError("\n".join(lines))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show the row in progress and the estimated remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    started: dict[int, float] = {}  # index of a row -> its start time

    class Remaining(ProgressColumn):
        """Remaining time; rich's own estimate only uses the last 30 s and ignores the first row."""

        def render(self, task: Task) -> Text:
            done = int(task.completed)
            if task.total is None or task.total == done:
                return Text("")
            first = min(started, default=done)
            if done == first:
                return Text("-:-- left")
            left = (started[done] - started[first]) / (done - first) * (task.total - done) - (
                time.monotonic() - started[done]
            )
            return Text(f"{datetime.timedelta(seconds=max(round(left), 0))} left")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("", total=None, visible=False)

        def on_step(text: str, done: int, left: int) -> None:
            if done <= max(started, default=-1):  # another pass over the rows
                started.clear()
            started.setdefault(done, time.monotonic())
            display.update(task, description=text, completed=done, total=done + left, visible=True)

        yield on_step


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print_line(error)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
