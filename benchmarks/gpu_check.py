"""Check correctness and speed on a GPU in a few minutes, the most important measurements first.

    python benchmarks/gpu_check.py                     # on a machine with a GPU; needs no network and no git
    python benchmarks/gpu_check.py --dry               # the same code on a CPU with tiny sizes; try this first

Each step runs in a separate process with a time limit, so that an error or a hang only affects that step. Results are
written after each step, as JSON and as a Markdown table. Networks that are timed compiled are compiled in the
background from the start; these processes are paused during timed steps.

Variants as in `benchmarks/speed.py`: `standard` (torchvision's network), `official channels_last` (PyPI `bcos`),
`fused` (this package, eager), `standard whole` and `whole` (both compiled as a whole); and `blocks`, compiled as by
`train.py`, for a ResNet block by block. `benchmarks/gpu.md` lists the requirements.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, check_writable, positive, write
from gpu_measurements import (
    DRY,
    ON_GPU,
    bandwidth,
    card,
    grid_pointing,
    parity,
    profile_training,
    stem_channels,
    train_run,
    training,
)
from isolation import Isolated, Pairs

EAGER = ["standard", "fused", "official channels_last"]
SHAPES = [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
DIGITS = ["dataset=digits", "trainer.max_epochs=3", "trainer.precision=bf16", "explanation.every_n_epochs=3"]


@dataclass(frozen=True)
class Step:
    """A measurement and its limit in seconds.

    Attributes:
        is_timed: Nothing else may run meanwhile.
        in_background: Starts immediately and prepares (compiles) until its turn.
    """

    seconds: int
    measure: Callable[..., Pairs]
    arguments: tuple[Any, ...] = ()
    is_timed: bool = True
    in_background: bool = False


def compiled(seconds: int, model: str, batch_size: int, variant: str) -> Step:
    return Step(seconds, training, (model, batch_size, [variant], True), in_background=True)


STEPS = {
    "card": Step(20, card),
    "parity resnet18": Step(45, parity, ("resnet18",), is_timed=False),
    "parity simple_vit_ti": Step(30, parity, ("simple_vit_ti_patch16_224",), is_timed=False),
    "parity densenet121": Step(45, parity, ("densenet121",), is_timed=False),
    "resnet50 eager": Step(75, training, ("resnet50", 256, EAGER)),
    "resnet50 standard compiled": compiled(120, "resnet50", 256, "standard whole"),
    "resnet50 compiled": compiled(120, "resnet50", 256, "whole"),
    "resnet50 compiled by train.py": compiled(90, "resnet50", 256, "blocks"),
    "profile": Step(30, profile_training, ("resnet50", 128)),
    "bandwidth": Step(40, bandwidth, (SHAPES,)),
    "stem": Step(20, stem_channels, (256,)),
    "grid pointing": Step(30, grid_pointing, (16,)),
    "simple_vit_s eager": Step(30, training, ("simple_vit_s_patch16_224", 256, EAGER)),
    "simple_vit_s standard compiled": compiled(40, "simple_vit_s_patch16_224", 256, "standard whole"),
    "simple_vit_s compiled": compiled(40, "simple_vit_s_patch16_224", 256, "whole"),
    "digits": Step(75, train_run, (60, DIGITS), is_timed=False),
    "densenet121 eager": Step(45, training, ("densenet121", 128, EAGER)),
    "densenet121 standard compiled": compiled(60, "densenet121", 128, "standard whole"),
    "densenet121 compiled": compiled(60, "densenet121", 128, "whole"),
}

#: Steps of a dry run; the other steps run the same code.
DRY_STEPS = [
    "parity resnet18",
    "parity simple_vit_ti",
    "resnet50 eager",
    "resnet50 standard compiled",
    "resnet50 compiled",
    "profile",
    "bandwidth",
    "stem",
    "grid pointing",
    "digits",
]


class Check:
    """Run steps one after another and write their results.

    Args:
        output: JSON file.
        seconds: Time for all steps; a step is skipped if less than half of its limit is left.
        dry: Run on a CPU with tiny sizes.
    """

    def __init__(self, output: Path, seconds: float, dry: bool) -> None:
        self.output, self.dry = output, dry
        self.end = time.monotonic() + seconds
        self.results: dict[str, dict[str, Any]] = {}
        self.background: dict[str, Isolated] = {}

    def run(self, names: list[str]) -> None:
        started = time.monotonic()
        try:
            for name in ["card", *(name for name in names if name != "card")]:
                self._step(name)
                shown = {key: value for key, value in self.results[name].items() if not key.isdecimal()}
                print(f"{time.monotonic() - started:4.0f} s  {name}: {shown}", flush=True)
                if name == "card":
                    if "error" in self.results[name]:  # without a GPU, all other steps fail too
                        return
                    self.background = {n: self._start(n) for n in names if STEPS[n].in_background}
        finally:
            for process in self.background.values():
                process.kill()

    def _start(self, name: str) -> Isolated:
        sys.stdout.flush()  # or the child process would print it again
        return Isolated(STEPS[name].measure, DRY if self.dry else ON_GPU, *STEPS[name].arguments)

    def _step(self, name: str) -> None:
        step, result = STEPS[name], self.results.setdefault(name, {})
        left = self.end - time.monotonic()
        if left < step.seconds / 2 and not self.dry:
            result["skipped"] = f"{left:.0f} s were left"
            return
        started = time.monotonic()
        process = self.background.pop(name, None) or self._start(name)
        others = list(self.background.values())

        def pause_others() -> None:
            for other in others:
                other.pause()

        if step.is_timed and not step.in_background:
            pause_others()
        try:
            limit = left if self.dry else min(step.seconds, left)  # no limit per step on a CPU
            for pair in process.results(limit, when_ready=pause_others):
                result.update([pair])
                write(self.output, self.results)
        finally:
            process.kill()
            for other in others:
                other.resume()
        result["took, s"] = round(time.monotonic() - started, 1)
        write(self.output, self.results)


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line per failure."""
    lines = []
    for name, result in results.items():
        rows = {name: result, **{f"{name}, {key}": row for key, row in result.items() if isinstance(row, dict)}}
        lines += [f"{place}: {row['error']}" for place, row in rows.items() if "error" in row]
        lines += [f"{name}: {key}: no" for key, value in result.items() if key.endswith("is accurate") and not value]
    return lines


def report(results: dict[str, dict[str, Any]]) -> str:
    """Format in Markdown: throughputs of each model, then the results of the other steps."""
    lines = ["# GPU check"]
    for model, rows in throughputs(results).items():
        lines += ["", f"## Training step of {model}, bfloat16", "", *table("variant", rows)]
    for name, result in results.items():
        if STEPS[name].measure is not training:
            lines += ["", f"## {name}", ""]
            lines += [f"* {key}: {value}" for key, value in result.items() if not isinstance(value, dict)]
            lines += ["", *table("", {key: value for key, value in result.items() if isinstance(value, dict)})]
    return "\n".join([*lines, ""])


def throughputs(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of each model, with ratios of images/s to the standard network, eager and compiled."""
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        if STEPS[name].measure is training:
            rows = models.setdefault(STEPS[name].arguments[0], {})
            rows |= {variant: dict(row) for variant, row in result.items() if isinstance(row, dict)}
    for rows in models.values():
        rates = {variant: row["images/s"] for variant, row in rows.items() if "images/s" in row}
        for row in rows.values():
            if "images/s" in row:
                bases = [base for base in ("standard", "standard whole") if base in rates]
                row |= {f"x {base}": round(row["images/s"] / rates[base], 3) for base in bases}
    return models


def table(corner: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    if not rows:
        return []
    return [
        f"| {' | '.join([corner, *columns])} |",
        "| --- " + "| ---: " * len(columns) + "|",
        *(f"| {' | '.join([name, *(str(row.get(key, '')) for key in columns)])} |" for name, row in rows.items()),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive, default=480, help="time for all steps (default: 480)")
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, metavar="STEP", help=f"steps to run (default: all): {', '.join(STEPS)}"
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU with tiny sizes")
    parser.add_argument("--output", type=Path, help="JSON; default: benchmarks/results/gpu-check[-dry].json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that child processes are killed
    output = arguments.output or ROOT / f"benchmarks/results/gpu-check{'-dry' if arguments.dry else ''}.json"
    check_writable(output)
    check = Check(output, arguments.seconds, arguments.dry)
    check.run(arguments.steps or (DRY_STEPS if arguments.dry else list(STEPS)))
    text = report(check.results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten: {os.path.relpath(output)}, {output.with_suffix('.md').name}")
    if failed := failures(check.results):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
