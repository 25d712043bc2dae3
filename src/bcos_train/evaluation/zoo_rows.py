"""Evaluate the rows of the Model Zoo table one after another, saving each result immediately."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bcos_train.model import create_model
from bcos_train.report.zoo_table import N_VAL, Row, model_cost, published_row, to_csv, to_json, to_markdown
from bcos_train.runs.layout import CHECKPOINT_SUFFIX, EVALUATION, RUN_CONFIG, SUMMARY, WEIGHTS_SUFFIX
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.files import file_sha256
from bcos_train.utils.suggestions import join_words
from bcos_train.weights.download import WeightsError, download_official
from bcos_train.weights.files import read_json, save_weights
from bcos_train.weights.records import RECORDS
from bcos_train.weights.source import read_export_config

__all__ = [
    "EvaluationFailed",
    "MissingWeights",
    "RowWeights",
    "Settings",
    "evaluate_arguments",
    "evaluate_row",
    "evaluate_rows",
    "find_own_weights",
    "is_complete",
    "summarize_failures",
    "write_table",
]

OFFICIAL, RANDOM = "official", "random"
#: Seed of random weights.
SEED = 0
#: Exit codes of a process that received a stop signal: 128 + SIGINT, SIGTERM or SIGUSR1, or minus the signal.
STOPPED = (130, 143, 138, -2, -15)
RESULT = "row.json"
#: File formats of the user's own weights.
SUFFIXES = (WEIGHTS_SUFFIX, ".pth", CHECKPOINT_SUFFIX)
#: Fields of a row that an evaluation fills in.
MEASURED = ("status", "weights", "top1", "top5", "images", "images_per_second", "comparable", "explanation")


class EvaluationFailed(Exception):
    """An evaluation failed; the message says why."""


class MissingWeights(Exception):
    """There are no weights for a row; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the evaluations.

    Args:
        weights: ``"official"``, ``"random"``, or a folder of the user's own weights or runs.
        data: Folder that holds ``val/``; ``None``: there is no data.
        batch_size: Images per batch.
        limit: Evaluate this many images; ``None``: all.
        device: ``auto``, ``cpu``, ``cuda``, ``gpu`` or ``mps``.

    Raises:
        ValueError: A folder is missing, or a number is below 1.
    """

    weights: str = OFFICIAL
    data: Path | None = None
    batch_size: int = 128
    limit: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.weights not in (OFFICIAL, RANDOM) and not Path(self.weights).is_dir():
            raise ValueError(f"--weights {self.weights}: {OFFICIAL}, {RANDOM} or a folder, and this is not a folder")
        if self.data is not None and not (self.data / "val").is_dir():
            missing = "it has no folder val/" if self.data.is_dir() else "no such folder"
            raise ValueError(
                f"--data {self.data}: {missing}; give the folder that holds val/, or set IMAGENET_PATH to it"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: at least 1")


@dataclass(frozen=True)
class RowWeights:
    """Weights of a row.

    Args:
        label: Name in the table.
        setting: Key and value for the command line of ``evaluate.py``.
        identity: Text that changes with the weights.
    """

    label: str
    setting: tuple[str, str]
    identity: str


#: Content of ``evaluation.json``.
EvaluationResult = Mapping[str, Any]
#: Evaluates a row with these weights; raises EvaluationFailed.
Evaluate = Callable[[str, RowWeights, Settings, Path], EvaluationResult]


def evaluate_rows(
    names: Sequence[str],
    settings: Settings,
    folder: Path,
    evaluate: Evaluate | None,
    on_step: Callable[[str, int, int], None] = lambda text, done, todo: None,
) -> list[Row]:
    """Evaluate rows as far as there are weights and data, rewriting the table after each row.

    A row that was evaluated with the same settings before is read from its file, so an interruption loses at most the
    row in progress.

    Args:
        names: Model names.
        settings: What to evaluate.
        folder: Folder of the table, and of a folder per row under ``rows/``.
        evaluate: Evaluates a row; ``None``: rows are listed without measurements.
        on_step: Called with the next step and the numbers of rows done and left: once for their cost, then again
            for the evaluations, where earlier results count as done.
    """
    rows: dict[str, Row] = {}
    for done, name in enumerate(names):
        on_step(f"{name}: parameters and GMACs", done, len(names) - done)
        rows[name] = published_row(name, *model_cost(name))
    todo: list[str] = []
    for name in names:
        if evaluate is not None and settings.data is None:
            rows[name] = replace(rows[name], status="no data")
        elif evaluate is not None:
            previous = _load_row(rows[name], settings, folder)
            rows[name] = previous or rows[name]
            todo += [] if previous else [name]
    write_table(list(rows.values()), settings, folder)
    for done, name in enumerate(todo, len(names) - len(todo)):
        assert evaluate is not None
        on_step(name, done, len(names) - done)
        rows[name] = _measure_row(rows[name], settings, folder, evaluate)
        write_table(list(rows.values()), settings, folder)
    on_step("done", len(names), 0)
    return list(rows.values())


def _measure_row(row: Row, settings: Settings, folder: Path, evaluate: Evaluate) -> Row:
    """Return the row with the results of an evaluation, or with the reason why there are none."""
    row_folder = folder / "rows" / row.name
    try:
        with _available_weights(row.name, settings.weights) as weights:
            row = _with_results(row, evaluate(row.name, weights, settings, row_folder), weights, settings)
    except (WeightsError, MissingWeights) as error:
        return replace(row, status="no weights", reason=str(error))
    except EvaluationFailed as error:
        return replace(row, status="failed", reason=str(error))
    content = {"settings": _result_key(weights, settings), "row": {key: getattr(row, key) for key in MEASURED}}
    _write(row_folder / RESULT, json.dumps(content, indent=2) + "\n")
    return row


def _with_results(row: Row, result: EvaluationResult, weights: RowWeights, settings: Settings) -> Row:
    """Add the content of an ``evaluation.json``."""
    count, seconds = int(result["count"]), float(result["seconds"])
    return replace(
        row,
        status="measured",
        weights=weights.label,
        top1=result["acc1"],
        top5=result["acc5"],
        images=count,
        images_per_second=count / seconds if seconds else None,
        comparable=settings.weights != RANDOM and result["dataset"] == "imagenet" and count == N_VAL,
        explanation={key: value for key, value in result.items() if key.startswith("explanation/")},
    )


def _load_row(row: Row, settings: Settings, folder: Path) -> Row | None:
    """Return the row with the results of an earlier evaluation with the same settings; ``None`` if there was none."""
    try:
        content = json.loads((folder / "rows" / row.name / RESULT).read_text(encoding="utf-8"))
        is_same = content["settings"] == _result_key(_find_weights(row.name, settings.weights), settings)
        return replace(row, **content["row"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError, MissingWeights):
        return None


def _result_key(weights: RowWeights, settings: Settings) -> dict[str, str | int | None]:
    """Return everything that a row's measurements depend on."""
    others = {"batch_size": settings.batch_size, "limit": settings.limit, "device": settings.device}
    return {"weights": weights.identity, "data": str(settings.data and settings.data.resolve()), **others}


def _find_weights(name: str, setting: str) -> RowWeights:
    """Return the weights of a row before they are downloaded or created.

    Raises:
        MissingWeights: The user's folder has none for it.
    """
    if setting == OFFICIAL:
        return RowWeights(OFFICIAL, ("weights", OFFICIAL), f"{OFFICIAL} {RECORDS[name].sha256}")
    if setting == RANDOM:
        return RowWeights(f"random (seed {SEED})", ("weights", ""), f"{RANDOM} {SEED}")
    return find_own_weights(name, Path(setting))


@contextmanager
def _available_weights(name: str, setting: str) -> Iterator[RowWeights]:
    """Make the weights of a row available within the block."""
    weights = _find_weights(name, setting)
    if setting == OFFICIAL:
        download_official(RECORDS[name])
    if setting != RANDOM:
        yield weights
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}{WEIGHTS_SUFFIX}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            save_weights(create_model(name), path)
        yield replace(weights, setting=("weights", str(path)))


def find_own_weights(name: str, folder: Path) -> RowWeights:
    """Find the weights of a row in a folder of weights files, exported folders or runs.

    A file is named like the model or like the official file, an exported folder like the model. Among the finished
    ImageNet runs of a model (``<folder>/imagenet/<model>/<run>`` or ``<folder>/<model>/<run>``), the latest is taken,
    with its best checkpoint.

    Raises:
        MissingWeights: There are none.
    """
    for file in (*(f"{name}{suffix}" for suffix in SUFFIXES), RECORDS[name].file):
        if (path := folder / file).is_file():
            return RowWeights(str(path), ("weights", str(path.resolve())), f"{path.resolve()} {file_sha256(path)}")
    if (path := folder / name).is_dir() and (config := read_export_config(path)) is not None:
        return RowWeights(str(path), ("weights", str(path.resolve())), f"{path.resolve()} {config['sha256']}")
    runs = [path.parent for place in (f"imagenet/{name}", name) for path in folder.glob(f"{place}/*/{RUN_CONFIG}")]
    finished = [run for run in runs if (run / SUMMARY).is_file()]
    if not finished:
        missing = f"no file {name}{join_words(SUFFIXES)}, no exported folder {name} and no run"
        raise MissingWeights(f"{folder}: {f'{len(runs)} runs have not finished' if runs else missing}")
    run = max(finished, key=lambda run: (run / SUMMARY).stat().st_mtime)
    return RowWeights(str(run), ("run", str(run.resolve())), f"{run.resolve()} {file_sha256(run / SUMMARY)}")


def evaluate_row(script: Path, name: str, weights: RowWeights, settings: Settings, output: Path) -> EvaluationResult:
    """Run ``evaluate.py`` in a separate process, with its output in a log file.

    Args:
        script: Path of ``evaluate.py``.
        name: Model name.
        weights: Weights to evaluate.
        settings: What to evaluate.
        output: Folder for the results, created if it is missing.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        EvaluationFailed: With the last line that the process printed.
        KeyboardInterrupt: The process received a stop signal.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / EVALUATION).unlink(missing_ok=True)
    log = output / "evaluate.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(script), *evaluate_arguments(name, weights, settings, output)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code in STOPPED:
        raise KeyboardInterrupt
    if code:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or ["no output"]
        raise EvaluationFailed(f"{lines[-1].strip()} (exit code {code}; {log})")
    return read_json(output / EVALUATION)


def evaluate_arguments(name: str, weights: RowWeights, settings: Settings, output: Path) -> list[str]:
    """Return the arguments of ``evaluate.py``."""
    values = dict([weights.setting])
    values |= {"dataset.root": str(settings.data and settings.data.resolve()), "output": str(output.resolve())}
    # A run specifies its model; its data set is given again, because the data may have moved.
    model = [] if weights.setting[0] == "run" else [f"model={name}"]
    numbers = {"batch_size": settings.batch_size, "limit_val": settings.limit or "null"}
    numbers["trainer.accelerator"] = settings.device
    return [*model, "dataset=imagenet", *(f"{k}={v}" for k, v in numbers.items()), *map(_quoted, values.items())]


def _quoted(item: tuple[str, str]) -> str:
    """Quote a value for Hydra, where colons, commas and braces are syntax."""
    return f"{item[0]}='{item[1].replace(chr(39), chr(92) + chr(39))}'"


def write_table(rows: Sequence[Row], settings: Settings, folder: Path) -> None:
    """Write ``model_zoo.md``, ``.csv`` and ``.json``, each atomically."""
    content = {
        "weights": settings.weights,
        "data": None if settings.data is None else str(settings.data),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "device": settings.device,
    }
    texts = {"md": to_markdown(rows), "csv": to_csv(rows), "json": to_json(rows, content)}
    for suffix, text in texts.items():
        _write(folder / f"model_zoo.{suffix}", text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def summarize_failures(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that failed, and one for all rows without weights."""
    lines = [f"{row.name}: {row.status}: {row.reason}" for row in rows if row.status == "failed"]
    if missing := [row for row in rows if row.status == "no weights"]:
        first = missing[0].name if len(missing) == 1 else f"the first, {missing[0].name}"
        lines.append(f"no weights for {len(missing)} of {len(rows)} rows; {first}: {missing[0].reason}")
    return lines


def is_complete(rows: Sequence[Row], setting: str) -> bool:
    """True if every row that has weights was measured: all rows have official and random ones, some the user's own."""
    statuses = [row.status for row in rows]
    has_all = "no weights" not in statuses or (setting not in (OFFICIAL, RANDOM) and "measured" in statuses)
    return has_all and "failed" not in statuses
