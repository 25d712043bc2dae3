"""Compare the cost of the grid pointing game with that of the official procedure.

    python benchmarks/grid_pointing.py                              # B-cos ResNet-50, 250 grids of 2x2, cells of 224 px
    python benchmarks/grid_pointing.py --grids 12 --grids-at-once 8     # more at once, for a GPU

Both score the same grids of the same network: `official` is PyPI `bcos` 0.1.3 with a forward and a backward pass for
each class of each grid, as in the evaluation of its repository; `ours` is this package's method `bcos` with one
forward pass for all classes of a batch of grids. They alternate, so that a busy machine slows both equally. Weights and
images are random, which doesn't change the work. The scores of both must agree; on a GPU both compute without TF32.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ROOT, environment, official_model, positive, use_tf32, write
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.explanation.method import Bcos
from bcos_train.metric import compose_grids, grid_pointing_scores
from bcos_train.nn import cached_weights

#: Largest allowed difference of scores: float32 sums in another order, on a GPU also other algorithms.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}


def official_scores(model: nn.Module, grids: Tensor, targets: Tensor, smooth: int) -> Tensor:
    """Compute scores ``(G, K)`` grid by grid and class by class."""
    scores = []
    for grid, classes in zip(grids, targets, strict=True):
        maps = []
        for target in classes:
            leaf = grid[None].clone().requires_grad_()
            with model.explanation_mode():  # type: ignore[operator]
                (gradient,) = torch.autograd.grad(model(leaf)[0, target], leaf)
            maps.append((leaf.detach() * gradient).sum(1))
        smoothed = F.avg_pool2d(torch.stack(maps, dim=1), smooth, stride=1, padding=smooth // 2)
        scores.append(grid_pointing_scores(smoothed, smooth=1))
    return torch.cat(scores)


def our_scores(model: nn.Module, grids: Tensor, targets: Tensor, smooth: int) -> Tensor:
    """Compute scores ``(G, K)`` of all grids and classes at once."""
    return grid_pointing_scores(Bcos()(model, grids, targets), smooth)


def draw(
    n_grids: int, n: int, size: int, device: str, generator: torch.Generator, num_classes: int = 1000
) -> tuple[Tensor, Tensor]:
    """Draw grids ``(G, 6, n size, n size)`` and the distinct classes of their cells ``(G, K)``."""
    images = torch.rand(n_grids, n * n, 3, size, size, generator=generator)
    classes = torch.stack([torch.randperm(num_classes, generator=generator)[: n * n] for _ in range(n_grids)])
    grids = compose_grids(torch.cat([images, 1 - images], dim=2))
    return grids.to(device, memory_format=torch.channels_last), classes.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--grids", type=positive, default=250)
    parser.add_argument("--n", type=positive, default=2, help="cells along a side (default: 2)")
    parser.add_argument("--size", type=positive, default=224, help="size of a cell in pixels (default: 224)")
    parser.add_argument("--smooth", type=positive, default=15)
    parser.add_argument("--grids-at-once", type=positive, default=2, help="batch size of `ours` (default: 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="JSON; default: benchmarks/results/grid-pointing-<device>.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    use_tf32(False)
    official = official_model(arguments.model).eval()
    ours = create_model(arguments.model).eval()
    ours.load_state_dict(official.state_dict())
    num_classes = ours.num_classes
    assert isinstance(num_classes, int)
    for model in (official, ours):
        model.to(arguments.device).to(memory_format=torch.channels_last)  # the faster format of both
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    with cached_weights(ours):
        for score, model in ((official_scores, official), (our_scores, ours)):
            score(model, *draw(1, arguments.n, 64, arguments.device, generator, num_classes), arguments.smooth)
        done, max_difference = 0, 0.0
        while done < arguments.grids:
            count = min(arguments.grids_at_once, arguments.grids - done)
            grids, targets = draw(count, arguments.n, arguments.size, arguments.device, generator, num_classes)
            scores = {}
            for name, score, model in (("official", official_scores, official), ("ours", our_scores, ours)):
                started = time.perf_counter()
                scores[name] = score(model, grids, targets, arguments.smooth).cpu()
                seconds[name].append((time.perf_counter() - started) / count)
            max_difference = max(max_difference, (scores["ours"] - scores["official"]).abs().max().item())
            done += count
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratio = medians["official"] / medians["ours"]
            shown = ", ".join(f"{name} {value:.3f} s per grid" for name, value in medians.items())
            print(f"{done}/{arguments.grids} grids: {shown}, speedup {ratio:.2f}", flush=True)
    settings = {key: getattr(arguments, key) for key in ("model", "grids", "n", "size", "smooth", "grids_at_once")}
    content = {
        "environment": environment(arguments.device),
        **settings,
        "seconds_per_grid": medians,
        "speedup": ratio,
        "max_score_difference": max_difference,
    }
    output = arguments.output or ROOT / f"benchmarks/results/grid-pointing-{arguments.device}.json"
    write(output, content)
    print(f"scores agree to {max_difference:.1g}; written: {os.path.relpath(output)}")
    if not max_difference <= (tolerance := TOLERANCE[arguments.device]):  # also if it is NaN
        raise SystemExit(f"the scores differ by {max_difference:.2g}, more than {tolerance:g}")


if __name__ == "__main__":
    main()
