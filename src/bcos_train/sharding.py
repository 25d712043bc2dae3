"""The command ``scripts/make_shards.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bcos_train.config import instantiate, user_errors_at
from bcos_train.dataset.storage.shard_check import verify_shards
from bcos_train.dataset.storage.shard_writer import SKIPPED, ShardOptions, write_shards
from bcos_train.runs.hash import with_absolute_paths
from bcos_train.runs.lock import locked
from bcos_train.training.config import TrainConfig
from bcos_train.training.options import default_workers
from bcos_train.utils.console import make_console
from bcos_train.utils.progress import show_progress

__all__ = ["ShardsConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(TrainConfig):
    """The keys of ``configs/make_shards.yaml``. Of the keys of training, the data set, seed and workers are used.

    Args:
        out: Folder for the shards.
        samples, megabytes, max_side, quality, order: See
            :class:`~bcos_train.dataset.storage.shard_writer.ShardOptions`.
        verify: Only compare the shards in ``out`` with their manifest.
    """

    out: str
    samples: int | None = None
    megabytes: int = 1000
    max_side: int | None = None
    quality: int = 90
    order: Literal["dataset", "balanced"] = "dataset"
    verify: bool = False


def run(config: Mapping[str, object]) -> int:
    """Write or verify shards with a validated config.

    Args:
        config: All keys of ``configs/make_shards.yaml``.

    Returns:
        Exit code: 1 if the verification finds problems.

    Raises:
        UserError: The data set or an option is invalid, or ``out`` has other shards.
    """
    settings = ShardsConfig(**instantiate(with_absolute_paths(config)))
    folder = Path(settings.out).expanduser()
    return _verify(folder) if settings.verify else _write(settings, folder)


def _verify(folder: Path) -> int:
    console = make_console()
    with user_errors_at(f"out={folder}"), show_progress("verifying shards") as on_shard:
        problems = verify_shards(folder, on_shard)
    for problem in problems:
        console.print(problem, style="red", soft_wrap=True)
    result = f"{len(problems)} problem(s) in {folder}" if problems else f"all shards in {folder} are complete"
    console.print(result, soft_wrap=True)
    return int(bool(problems))


def _write(settings: ShardsConfig, folder: Path) -> int:
    console = make_console()
    with user_errors_at(""):
        options = ShardOptions(
            samples=settings.samples,
            megabytes=settings.megabytes,
            max_side=settings.max_side,
            quality=settings.quality,
            order=settings.order,
            seed=settings.seed,
        )
    with user_errors_at("dataset"):
        settings.dataset.prepare()
    workers = default_workers() if settings.num_workers is None else settings.num_workers
    with user_errors_at(""), locked(folder), show_progress("writing shards") as on_shard:
        manifest = write_shards(settings.dataset, folder, options, max(1, workers), on_shard)
    for part, entry in manifest["parts"].items():  # type: ignore[attr-defined]
        skipped = f", {entry['skipped']:,} unreadable, see {folder / SKIPPED}" if entry["skipped"] else ""
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e9
        shards = f"{entry['samples']:,} samples in {len(entry['shards'])} shards, {size:.2f} GB"
        console.print(f"{part}: {shards}{skipped}", soft_wrap=True)
    console.print(f"folder: {folder}", soft_wrap=True)
    return 0
