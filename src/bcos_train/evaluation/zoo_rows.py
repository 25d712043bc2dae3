"""Measures the rows of the Model Zoo table: one evaluation after another, each kept as soon as it has ended."""

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
from bcos_train.model.source import RUN_CONFIG, describe
from bcos_train.model.weights import file_sha256, save_weights
from bcos_train.replacing import replacing
from bcos_train.report.zoo_table import N_VAL, Row, listed, size, to_csv, to_json, to_markdown
from bcos_train.weights.download import WeightsError, official_file
from bcos_train.weights.records import RECORDS

__all__ = ["Failed", "Settings", "Source", "evaluate_row", "find_own", "is_complete", "measure", "problems"]
__all__ += ["write_table"]

OFFICIAL, RANDOM = "official", "random"
#: Of random weights.
SEED = 0
#: What a process leaves with when it was told to stop (128 + SIGINT, SIGTERM, SIGUSR1), or a signal ended it.
STOPPED = (130, 143, 138, -2, -15)
#: What a run folder holds once its run has ended.
SUMMARY = "summary.json"
RESULT = "row.json"


class Failed(Exception):
    """An evaluation that came to nothing, and why."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated, on what, and how.

    Args:
        weights: ``"official"``, ``"random"`` or a folder of one's own weights or runs.
        data: The folder that holds ``val/``; ``None``: there is none.
        batch_size: Images at a time.
        limit: Take this many images; ``None``: all.
        device: ``auto``, ``cpu``, ``cuda``, ``gpu`` or ``mps``.

    Raises:
        ValueError: A folder that isn't there, or a number below 1.
    """

    weights: str = OFFICIAL
    data: Path | None = None
    batch_size: int = 128
    limit: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.weights not in (OFFICIAL, RANDOM) and not Path(self.weights).is_dir():
            raise ValueError(f"--weights {self.weights}: {OFFICIAL}, {RANDOM} or a folder, and this is no folder")
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
class Source:
    """Weights of a row.

    Args:
        label: What the table calls them.
        setting: The setting of ``evaluate.py`` that takes them.
        identity: What changes when they do.
    """

    label: str
    setting: tuple[str, str]
    identity: str


#: Gives the content of ``evaluation.json`` for a row with these weights. Raises :class:`Failed`.
Evaluate = Callable[[str, Source, Settings, Path], Mapping[str, Any]]


def measure(
    names: Sequence[str],
    settings: Settings,
    folder: Path,
    evaluate: Evaluate | None,
    on_step: Callable[[str, int, int], None] = lambda text, done, todo: None,
) -> list[Row]:
    """The rows of the table, with measurements as far as there are weights and data; the table is written all the time.

    A row that was measured with the same settings before is taken from its file, so an interruption loses at most the
    row that was being measured.

    Args:
        names: The models.
        settings: What is evaluated.
        folder: Of the table, and of a folder for each row under ``rows/``.
        evaluate: Does it; ``None``: the rows are only listed.
        on_step: Called with what comes next, and how many rows are done, and are left: once for their sizes, then
            again from those on that were measured before.
    """
    rows: dict[str, Row] = {}
    for done, name in enumerate(names):
        on_step(f"{name}: parameters and GMACs", done, len(names) - done)
        rows[name] = listed(name, *size(name))
    todo: list[str] = []
    for name in names:
        if evaluate is not None and settings.data is None:
            rows[name] = replace(rows[name], status="no data")
        elif evaluate is not None:
            kept = _kept(name, settings, folder)
            rows[name] = replace(rows[name], **({} if kept is None else kept))
            todo += [name] if kept is None else []
    write_table(list(rows.values()), settings, folder)
    for done, name in enumerate(todo, len(names) - len(todo)):
        assert evaluate is not None
        on_step(name, done, len(names) - done)
        rows[name] = replace(rows[name], **_measure_one(name, settings, folder, evaluate))
        write_table(list(rows.values()), settings, folder)
    on_step("done", len(names), 0)
    return list(rows.values())


def _measure_one(name: str, settings: Settings, folder: Path, evaluate: Evaluate) -> dict[str, Any]:
    place = folder / "rows" / name
    try:
        with _weights(name, settings.weights) as source:
            result = evaluate(name, source, settings, place)
            found = _figures(result, source, settings.weights)
            content = {"settings": _key(source, settings), "row": found}
    except (WeightsError, NoWeights) as error:
        return {"status": "no weights", "reason": str(error)}
    except Failed as error:
        return {"status": "failed", "reason": str(error)}
    _write(place / RESULT, json.dumps(content, indent=2) + "\n")
    return found


def _figures(result: Mapping[str, Any], source: Source, weights: str) -> dict[str, Any]:
    """What goes into the row, of the content of an ``evaluation.json``."""
    count, seconds = int(result["count"]), float(result["seconds"])
    return {
        "status": "measured",
        "weights": source.label,
        "top1": result["acc1"],
        "top5": result["acc5"],
        "images": count,
        "images_per_second": count / seconds if seconds else None,
        "comparable": weights != RANDOM and result["dataset"] == "imagenet" and count == N_VAL,
        "explanation": {key: value for key, value in result.items() if key.startswith("explanation/")},
    }


def _kept(name: str, settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The figures of an earlier run with the same settings."""
    try:
        content = json.loads((folder / "rows" / name / RESULT).read_text(encoding="utf-8"))
        same = content["settings"] == _key(_identify(name, settings.weights), settings)
        return dict(content["row"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, NoWeights):
        return None


def _key(source: Source, settings: Settings) -> dict[str, Any]:
    """What the figures of a row depend on."""
    own = {"batch_size": settings.batch_size, "limit": settings.limit, "device": settings.device}
    return {"weights": source.identity, "data": str(settings.data and settings.data.resolve()), **own}


class NoWeights(Exception):
    """There are none for a row, and why."""


def _identify(name: str, weights: str) -> Source:
    """The weights of a row, before they are fetched or made.

    Raises:
        NoWeights: A folder has none for it.
    """
    if weights == OFFICIAL:
        return Source(OFFICIAL, ("weights", OFFICIAL), f"{OFFICIAL} {RECORDS[name].sha256}")
    if weights == RANDOM:
        return Source(f"random (seed {SEED})", ("weights", ""), f"{RANDOM} {SEED}")
    return find_own(name, Path(weights))


@contextmanager
def _weights(name: str, weights: str) -> Iterator[Source]:
    """The weights of a row, there to be read within the block."""
    source = _identify(name, weights)
    if weights == OFFICIAL:
        official_file(RECORDS[name])
    if weights != RANDOM:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            save_weights(create_model(name), path)
        yield replace(source, setting=("weights", str(path)))


def find_own(name: str, folder: Path) -> Source:
    """The weights of a row in a folder of files, of exported folders or of runs.

    A file is called as the model or as the official file, an exported folder as the model. Of the runs of a model on
    ImageNet that have ended (``<folder>/imagenet/<model>/<run>`` or ``<folder>/<model>/<run>``) it is the latest, with
    its best checkpoint.

    Raises:
        NoWeights: There are none.
    """
    for file in (*(f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".ckpt")), RECORDS[name].file):
        if (path := folder / file).is_file():
            return Source(str(path), ("weights", str(path.resolve())), f"{path.resolve()} {file_sha256(path)}")
    if (path := folder / name).is_dir() and (found := describe(path)).is_export:
        return Source(str(path), ("weights", str(path.resolve())), f"{path.resolve()} {found.config['sha256']}")
    runs = [path.parent for place in (f"imagenet/{name}", name) for path in folder.glob(f"{place}/*/{RUN_CONFIG}")]
    ended = [run for run in runs if (run / SUMMARY).is_file()]
    if not ended:
        missing = f"no file {name}.safetensors, .pth or .ckpt, no exported folder {name} and no run"
        text = f"{len(runs)} runs have not ended" if runs else missing
        raise NoWeights(f"{folder}: {text}")
    run = max(ended, key=lambda run: (run / SUMMARY).stat().st_mtime)
    return Source(str(run), ("run", str(run.resolve())), f"{run.resolve()} {file_sha256(run / SUMMARY)}")


def evaluate_row(door: Path, name: str, source: Source, settings: Settings, place: Path) -> Mapping[str, Any]:
    """Evaluate in a process of its own, as ``python evaluate.py …`` on the command line; its output goes to a log.

    Args:
        door: ``evaluate.py``.
        place: Folder for the results, made if it is missing.

    Raises:
        Failed: With the last line that the process printed.
        KeyboardInterrupt: The process was told to stop.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "evaluation.json").unlink(missing_ok=True)
    log = place / "evaluate.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(door), *evaluate_settings(name, source, settings, place)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code in STOPPED:
        raise KeyboardInterrupt
    if code:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or ["no output"]
        raise Failed(f"{lines[-1].strip()} (exit code {code}; {log})")
    content: dict[str, Any] = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    return content


def evaluate_settings(name: str, source: Source, settings: Settings, place: Path) -> list[str]:
    """The arguments of ``evaluate.py``."""
    values = dict([source.setting])
    values |= {"dataset.root": str(settings.data and settings.data.resolve()), "output": str(place.resolve())}
    # A run knows its model; its data set is named again, because the place may have changed.
    chosen = [] if source.setting[0] == "run" else [f"model={name}"]
    numbers = {"batch_size": settings.batch_size, "limit_val": settings.limit or "null"}
    numbers["trainer.accelerator"] = settings.device
    return [*chosen, "dataset=imagenet", *(f"{k}={v}" for k, v in numbers.items()), *map(_quoted, values.items())]


def _quoted(item: tuple[str, str]) -> str:
    """A setting whose value may hold any sign; a colon, a comma or a brace means something to Hydra."""
    return f"{item[0]}='{item[1].replace(chr(39), chr(92) + chr(39))}'"


def write_table(rows: Sequence[Row], settings: Settings, folder: Path) -> None:
    """``model_zoo.md``, ``.csv`` and ``.json``, each replaced as a whole."""
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
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def problems(rows: Sequence[Row]) -> list[str]:
    """What went wrong: a line for each row that failed, and one for all that have no weights."""
    lines = [f"{row.name}: {row.status}: {row.reason}" for row in rows if row.status == "failed"]
    if missing := [row for row in rows if row.status == "no weights"]:
        whose = missing[0].name if len(missing) == 1 else f"the first, {missing[0].name}"
        lines.append(f"no weights for {len(missing)} of {len(rows)} rows; {whose}: {missing[0].reason}")
    return lines


def is_complete(rows: Sequence[Row], weights: str) -> bool:
    """Whether all was measured that could be: each row has official and random weights, some one's own."""
    statuses = [row.status for row in rows]
    has_all = "no weights" not in statuses or (weights not in (OFFICIAL, RANDOM) and "measured" in statuses)
    return has_all and "failed" not in statuses
