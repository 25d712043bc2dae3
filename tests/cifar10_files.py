"""CIFAR-10 as files, for tests without the data set."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(
    folder: Path,
    n: int = 3,
    color: Callable[[int, int], tuple[int, int, int]] = lambda label, i: (250, 25 * label, 80 * i),
) -> Path:
    """Write ``n`` images of each class and part in the single color of label and number, and return the folder."""
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (32, 32), color(label, i)).save(folder / part / name / f"{i:04}.png")
    return folder
