"""The command ``scripts/verify_data.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcos_train.config import instantiate, user_errors_at
from bcos_train.dataset.verify import verify
from bcos_train.runs.hash import with_absolute_paths
from bcos_train.training.config import TrainConfig
from bcos_train.training.options import default_workers
from bcos_train.utils.console import make_console
from bcos_train.utils.files import write_json
from bcos_train.utils.progress import show_progress

__all__ = ["VerifyConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(TrainConfig):
    """The keys of ``configs/verify_data.yaml``. Of the keys of training, the data set and the workers are used.

    Args:
        output: JSON file for the report.
    """

    output: str = "data_report.json"


def run(config: Mapping[str, object]) -> int:
    """Check a data set with a validated config.

    Args:
        config: All keys of ``configs/verify_data.yaml``.

    Returns:
        Exit code: 1 if there is a problem.

    Raises:
        UserError: The data set is missing, or the report can't be written.
    """
    settings = VerifyConfig(**instantiate(with_absolute_paths(config)))
    console, path = make_console(), Path(settings.output).expanduser()
    with user_errors_at("output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with user_errors_at("dataset"), show_progress("images") as on_images:
        settings.dataset.prepare()
        workers = default_workers() if settings.num_workers is None else settings.num_workers
        report: dict[str, Any] = verify(settings.dataset, workers, on_images)
    with user_errors_at("output"):
        write_json(path, report)
    for name, part in report["parts"].items():
        counts = part["classes"].values()
        console.print(
            f"{name}: {part['images']:,} images in {len(counts)} classes of {min(counts, default=0):,} to "
            f"{max(counts, default=0):,}; {part['n_unreadable']:,} unreadable, {part['n_duplicates']:,} copied",
            soft_wrap=True,
        )
        for entry in part["unreadable"][:5]:
            console.print(f"  {entry['problem']}", style="red", soft_wrap=True)
    if report["n_overlap"]:
        console.print(f"{report['n_overlap']:,} images are in both parts", style="red")
    console.print(f"report: {path}", soft_wrap=True)
    return int(report["problems"] > 0)
