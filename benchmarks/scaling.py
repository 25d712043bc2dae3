"""Measure how time and memory of a training step grow with batch size, resolution and depth.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --batch-sizes 32 64 128 256 --device cuda --dtype bfloat16

One of them is varied at a time, starting from a ResNet-50 with 8 images of 224 px, and measured as in
`benchmarks/speed.py`. Writes JSON with the machine, the versions and the commit, and prints a table of milliseconds per
step and peak memory in MiB.
"""

import argparse
import os
from typing import Any

from common import ROOT, environment, parser_for, positive, write
from speed import Setting, measure

VARIANTS = ("standard", "official channels_last", "fused")
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def settings(arguments: argparse.Namespace) -> dict[str, list[Setting]]:
    """Return the settings of each series, by the name of what varies."""
    shared = {"device": arguments.device, "dtype": arguments.dtype}
    size, batch_size = 224, 8
    return {
        "batch": [Setting("resnet50", n, size, **shared) for n in arguments.batch_sizes],
        "resolution": [Setting("resnet50", batch_size, pixels, **shared) for pixels in arguments.sizes],
        "depth": [Setting(model, batch_size, size, **shared) for model in arguments.models],
    }


def table(results: list[dict[str, Any]], variants: list[str]) -> str:
    """Format time and memory of each variant in Markdown, one row per setting."""
    lines = [
        f"| varied | model, images | {' | '.join(f'{v} | ' for v in variants)}|",
        f"| --- | --- | {' | '.join('---: | ---:' for _ in variants)} |",
    ]
    for result in results:
        cells = [f"{result['train'][v] * 1e3:.0f} ms | {result['memory'][v]:.0f} MiB" for v in variants]
        images = f"{result['model']}, {result['batch_size']} x {result['size']} px"
        lines.append(f"| {result['varied']} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_for("scaling", __doc__.splitlines()[0], repeats=5)
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[2, 4, 8, 16, 32])
    parser.add_argument("--sizes", nargs="+", type=positive, default=[112, 160, 224, 320, 448], help="in pixels")
    parser.add_argument("--models", nargs="+", default=list(DEPTHS), choices=DEPTHS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    output = arguments.output or ROOT / f"benchmarks/results/scaling-{arguments.device}-{arguments.dtype}.json"
    machine = environment(arguments.device)
    results: list[dict[str, Any]] = []
    measured: dict[Setting, dict[str, Any]] = {}  # the common starting point is measured once
    for varied, steps in settings(arguments).items():
        for setting in steps:
            if setting not in measured:
                measured[setting] = measure(setting, arguments.variants, ["train"], arguments.repeats, memory=True)
            results.append({"varied": varied, **measured[setting]})
            print(table(results[-1:], arguments.variants).splitlines()[-1], flush=True)
            write(output, {"environment": machine, "dtype": arguments.dtype, "results": results})
    print(f"\n{table(results, arguments.variants)}\n\nwritten: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
