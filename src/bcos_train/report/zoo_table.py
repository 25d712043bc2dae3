"""The Model Zoo table: its rows, and their rendering as Markdown, CSV and JSON."""

import csv
import io
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch
from torch.utils.flop_counter import FlopCounterMode

from bcos_train.model import create_model
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.weights.records import RECORDS

__all__ = [
    "Row",
    "model_cost",
    "published_row",
    "select_rows",
    "to_csv",
    "to_json",
    "to_markdown",
    "train_command",
    "update_readme",
]

#: Images of ImageNet's validation set, which the published accuracies are measured on.
N_VAL = 50_000
#: Lines in README.md that enclose the generated table.
BEGIN = "<!-- model zoo: written by `python scripts/model_zoo.py --readme` -->"
END = "<!-- model zoo: end -->"
#: Side in pixels of the image that operations are counted for.
SIDE = 224
GMACS = (
    f"GMACs: 10⁹ multiply-accumulate operations in the convolutions and matrix products for one image of {SIDE} x "
    f"{SIDE} pixels, as counted by `torch.utils.flop_counter`; norms and other element-wise operations are not "
    "included."
)
SPEED = "Images/s: over the whole evaluation, including reading and decoding the images."
EMPTY = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Args:
        name: Model name.
        params: Exact number of parameters.
        gmacs: See :data:`GMACS`.
        params_published_m: Published number of parameters, in millions.
        top1_published, top5_published: Published accuracies, in percent.
        status: ``"measured"``, or why there are no measurements: ``"no data"``, ``"no weights"``, ``"failed"``,
            ``"not evaluated"``.
        reason: Details of the status, in one line.
        weights: The evaluated weights.
        top1, top5: Measured accuracies, in percent.
        images: Number of images they were measured on.
        images_per_second: See :data:`SPEED`.
        comparable: True if the accuracies can be compared with the published ones.
        explanation: Explanation metrics by name.
    """

    name: str
    params: int
    gmacs: float
    params_published_m: float
    top1_published: float
    top5_published: float
    status: str = "not evaluated"
    reason: str = ""
    weights: str = ""
    top1: float | None = None
    top5: float | None = None
    images: int | None = None
    images_per_second: float | None = None
    comparable: bool = False
    explanation: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_count_misprinted(self) -> bool:
        """True if the published number of parameters is not the exact one, rounded."""
        return round(self.params / 1e6, 2) != self.params_published_m

    def difference(self, key: str) -> float | None:
        """Return measured minus published ``top1`` or ``top5`` in percentage points; ``None`` if not comparable."""
        measured: float | None = getattr(self, key)
        if measured is None or not self.comparable:
            return None
        return round(measured - getattr(self, f"{key}_published"), 3)


def select_rows(patterns: Iterable[str]) -> list[str]:
    """Return the names of the rows that match one of the shell-style patterns, in the zoo's order.

    Args:
        patterns: Such as ``"resnet*"``; none: all rows.

    Raises:
        ValueError: No row matches a pattern; the message names the nearest row.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in RECORDS):
            raise ValueError(f"--models {pattern}: no row of the zoo matches{suggest(pattern.strip('*?'), RECORDS)}")
    return [name for name in RECORDS if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def model_cost(name: str) -> tuple[int, float]:
    """Count the parameters and the GMACs (:data:`GMACS`) of a model, built on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, getattr(model, "in_chans", 3), SIDE, SIDE))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def published_row(name: str, params: int, gmacs: float) -> Row:
    """Return the row of a model before anything is measured."""
    record = RECORDS[name]
    return Row(
        name=name,
        params=params,
        gmacs=gmacs,
        params_published_m=record.params_published_m,
        top1_published=record.top1,
        top5_published=record.top5,
    )


def train_command(name: str) -> list[str]:
    """Return the arguments after ``python`` that train a row by its own recipe."""
    return ["train.py", f"model={name}", "dataset=imagenet"]


def to_markdown(rows: Sequence[Row]) -> str:
    """Render the measurements as a table, followed by notes on its columns."""
    metrics = _metric_names(rows)
    head = ["model", "top-1 [%]", "published", "difference", "top-5 [%]", "published", "difference"]
    head += ["parameters", "GMACs", "images/s", *metrics]
    lines = []
    for row in rows:
        cells = [f"`{row.name}`"]
        for key in ("top1", "top5"):
            cells += [_measured(row, key), f"{getattr(row, f'{key}_published'):.3f}", _difference(row, key)]
        cells += [_params(row), f"{row.gmacs:.2f}", _number(row.images_per_second, ".1f")]
        lines.append([*cells, *(_number(row.explanation.get(name), ".4f") for name in metrics)])
    return f"# Model Zoo\n\n{_table(head, lines)}\n\n" + "\n".join(f"* {note}" for note in _notes(rows)) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Render all figures as CSV, unrounded; missing ones are empty."""
    metrics = _metric_names(rows)
    file = io.StringIO()
    records = [{**_flat(row), **{name: row.explanation.get(name) for name in metrics}} for row in rows]
    writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def to_json(rows: Sequence[Row], settings: Mapping[str, object]) -> str:
    """Render all figures and the settings that they were measured with as JSON."""
    content = {
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "gmacs": GMACS,
        "images_per_second": SPEED,
        "rows": [{**_flat(row), "explanation": dict(row.explanation)} for row in rows],
    }
    return json.dumps(content, indent=2) + "\n"


def update_readme(text: str, rows: Sequence[Row]) -> str:
    """Replace the table in a README's text by the published figures of the rows.

    Raises:
        ValueError: The lines :data:`BEGIN` and :data:`END` don't occur once each, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the README has no place for the table: a line {BEGIN} and, after it, a line {END}")
    head = ["model", "parameters", "GMACs", "top-1 [%]", "top-5 [%]"]
    table = _table(head, [readme_cells(row) for row in rows])
    notes = ["Accuracies are the published ones.", GMACS, *_misprint_note(rows)]
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n\n{table}\n\n{' '.join(notes)}\n\n{after}"


def readme_cells(row: Row) -> list[str]:
    """Return the cells of a row of the README's table."""
    accuracies = [f"{row.top1_published:.3f}", f"{row.top5_published:.3f}"]
    return [f"`{row.name}`", _params(row), f"{row.gmacs:.2f}", *accuracies]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _measured(row: Row, key: str) -> str:
    if getattr(row, key) is None:
        return row.status
    return f"{getattr(row, key):.3f}{'' if row.comparable else ' (not comparable)'}"


def _difference(row: Row, key: str) -> str:
    if getattr(row, key) is not None and not row.comparable:
        return "not comparable"
    return _number(row.difference(key), "+.3f")


def _params(row: Row) -> str:
    return f"{row.params:,}" + (f" (published: {row.params_published_m} M)" if row.is_count_misprinted else "")


def _number(value: float | None, form: str) -> str:
    return EMPTY if value is None else f"{value:{form}}"


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    measured = [row for row in rows if row.status == "measured"]
    groups: dict[tuple[int | None, str], list[str]] = {}
    for row in measured:
        groups.setdefault((row.images, row.weights), []).append(row.name)
    for (images, weights), names in groups.items():
        which = "" if len(names) == len(rows) else f" ({join_words(names, last='and')})"
        notes.append(f"Measured on {images:,} images with weights: {weights}{which}.")
    if any(not row.comparable for row in measured):
        notes.append(
            f"Not comparable: published accuracies are those of trained weights on all {N_VAL:,} validation images."
        )
    notes += [f"`{row.name}`: {row.status}: {row.reason}" for row in rows if row.reason]
    return [*notes, GMACS, SPEED, *_misprint_note(rows)]


def _misprint_note(rows: Sequence[Row]) -> list[str]:
    names = [f"`{row.name}`" for row in rows if row.is_count_misprinted]
    if not names:
        return []
    return [f"The published numbers of parameters of {', '.join(names)} are misprints; this table has the exact ones."]


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.explanation))


def _flat(row: Row) -> dict[str, object]:
    """Return all fields but the explanation metrics, with derived values."""
    content = asdict(row)
    del content["explanation"]
    differences = {f"{key}_difference": row.difference(key) for key in ("top1", "top5")}
    misprint = {"params_published_is_misprint": row.is_count_misprinted}
    return {**content, **differences, **misprint, "command": f"python {' '.join(train_command(row.name))}"}
