"""Compare explanation methods in a figure: rows are images, columns are methods.

python scripts/compare_methods.py --run runs/digits/resnet20/default-…             # validation images of the run
python scripts/compare_methods.py --run … --methods bcos int_grad rise --n 8 --explain label
python scripts/compare_methods.py --model resnet50 --images dog.jpg cat.jpg        # official weights, any image files
python scripts/compare_methods.py --model resnet50 --weights my.pth --data $IMAGENET_PATH

Red is evidence for the explained class, blue against it; each map has its own symmetric scale. For B-cos networks the
color explanation comes first: W(x), each pixel in the color that it responds to.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bcos_train import LoadedClassifier, create_model, load
from bcos_train.dataset.classes import with_model_classes
from bcos_train.explanation import color_explanation, evaluating, explain, is_explainable
from bcos_train.explanation.method import CannotExplain, Method, list_methods, make_method
from bcos_train.report import Panel, Row, map_table, save_gallery
from bcos_train.runs.layout import RUN_CONFIG
from bcos_train.utils.command_line import MISTAKE, Parser
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.utils.terminal import print_line
from bcos_train.weights.run_source import class_names_of
from bcos_train.weights.source import read_model_weights

DEFAULT_METHODS = ("bcos", "ixg", "gradient", "int_grad", "guided_backprop", "grad_cam")
RANDOM, PREDICTION, LABEL = "random", "prediction", "label"
#: Smoothing window of the opacity in pixels at a height of 224, as in the papers' figures; scaled in proportion.
SMOOTH = 15


def parser() -> Parser:
    result = Parser(__doc__)
    add = result.add_argument
    add("--run", type=Path, metavar="FOLDER", help="run folder: its model, data and transforms")
    add("--checkpoint", default="best", help="checkpoint of the run: best (default), last or a path")
    add("--model", metavar="NAME", help="one of bcos_train.list_models(), instead of a run")
    add("--weights", default="official", help="weights of the model: official (default), random, or a path")
    add("--images", nargs="+", type=Path, metavar="FILE", help="image files (default: validation images)")
    add("--data", type=Path, help="with --model: ImageNet's folder, which holds val/ (default: $IMAGENET_PATH)")
    add("--n", type=int, default=6, help="number of validation images (default: 6)")
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=", ".join(list_methods()))
    add("--explain", default=PREDICTION, metavar="CLASS", help="prediction (default), label, or a class index")
    add("--smooth", type=int, default=1, help="odd window in pixels for averaging maps (default: 1, none)")
    add("--batch-size", type=int, default=8, help="images explained at once (default: 8)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--output", type=Path, default=Path("comparison.png"), help="the figure (default: comparison.png)")
    return result


@dataclass
class Subject:
    """A classifier and its validation images.

    Attributes:
        title: Title of the figure.
        classifier: The classifier.
        val: Returns the first n validation images as PIL images with labels; raises a ValueError if there are none.
    """

    title: str
    classifier: LoadedClassifier
    val: Callable[[int], list[tuple[Image.Image, int]]]


def subject_of_run(folder: Path, checkpoint: str) -> Subject:
    """Load the model of a run with its evaluation transform and data set."""
    from bcos_train.config import instantiate
    from bcos_train.config import load as load_config
    from bcos_train.training.config import find_moved_dataset

    config = load_config(folder / RUN_CONFIG)
    classifier = load(folder, checkpoint=checkpoint)
    dataset: Any = instantiate(find_moved_dataset(config["dataset"]), path="dataset")
    dataset = with_model_classes(dataset, classifier.recorded_class_names, str(folder))
    # A model may have more outputs than its data set has classes.
    names = (*dataset.class_names, *classifier.class_names[dataset.num_classes :])
    classifier = replace(classifier, class_names=names[: len(classifier.class_names)])
    return Subject(f"{config['model']['name']} on {dataset.name}", classifier, lambda n: val_images(dataset, n))


def subject_of_model(name: str, weights: str, data: Path | None) -> Subject:
    """Load a model with the inference transform that belongs to it."""
    torch.manual_seed(0)  # seeds random weights
    model = create_model(name, weights=None if weights == RANDOM else weights)
    n = int(model.num_classes)  # type: ignore[arg-type]
    classifier = LoadedClassifier(model, name, (class_names_of("imagenet") or ()) if n == 1000 else ())
    folder = data or os.environ.get("IMAGENET_PATH")

    def val(n_images: int) -> list[tuple[Image.Image, int]]:
        if n != 1000:
            raise ValueError(f"{name} has {n} classes, which are not ImageNet's: give --images")
        if not folder:
            raise ValueError("no images: give --images, or --data (or IMAGENET_PATH) for validation images")
        from bcos_train.dataset import ImageNet

        names = None if weights == RANDOM else read_model_weights(name, weights).class_names
        return val_images(with_model_classes(ImageNet(folder), names, f"the weights of {name}"), n_images)

    return Subject(f"{name}, {weights} weights" if weights in (RANDOM, "official") else name, classifier, val)


def val_images(dataset: Any, n: int) -> list[tuple[Image.Image, int]]:
    """Return the first images of a fixed permutation, the same as in the galleries."""
    from bcos_train.dataset.randomness import Stream, permutation

    part = dataset.val()
    return [part[i] for i in permutation(len(part), 0, Stream.SUBSET, 1)[:n].tolist()]


def select_classes(logits: Tensor, labels: Sequence[int | None], which: str) -> Tensor:
    """Return the class to explain for each image: (N,)."""
    if which == PREDICTION:
        return logits.argmax(1)
    if which == LABEL:
        if None in labels:
            raise ValueError(f"--explain {LABEL}: image files have no labels; prediction or a class index")
        return torch.tensor(labels, device=logits.device)
    if not which.isdecimal():
        raise ValueError(
            f"--explain {which}: {PREDICTION}, {LABEL} or a class index{suggest(which, (PREDICTION, LABEL))}"
        )
    if int(which) >= logits.shape[1]:
        raise ValueError(f"--explain {which}: there are classes 0 to {logits.shape[1] - 1}")
    return torch.full((len(logits),), int(which), device=logits.device)


def compute_maps(
    name: str, method: Method, model: nn.Module, x: Tensor, targets: Tensor, batch_size: int, smooth: int
) -> Sequence[Tensor]:
    """Return a signed map (H, W) per image; if the method can't explain the model, print the reason and return none."""
    print(f"{name} …", file=sys.stderr)
    parts = []
    try:
        for images, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
            maps = method(model, images, classes[:, None])
            parts.append(F.avg_pool2d(maps, smooth, stride=1, padding=smooth // 2)[:, 0].cpu())
    except (CannotExplain, ModuleNotFoundError) as error:
        print_line(f"{name}: {error}")
        return []
    return torch.cat(parts).unbind()


def color_maps(model: nn.Module, x: Tensor, targets: Tensor, batch_size: int) -> list[Tensor]:
    """Return the color explanation of each image on white: (H, W, 3)."""
    window = max(1, 2 * round((SMOOTH * x.shape[2] / 224 - 1) / 2) + 1)
    pictures: list[Tensor] = []
    for images, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
        rgba = color_explanation(images, explain(model, images, classes).weights, window).cpu()
        pictures += (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]).unbind()
    return pictures


def check(arguments: argparse.Namespace) -> dict[str, Method]:
    """Check the arguments and return the methods by name.

    Raises:
        ValueError: An argument is wrong.
    """
    if (arguments.run is None) == (arguments.model is None):
        raise ValueError("give --run <run folder>, or --model <name> with --weights official|random|<path>")
    for key in ("n", "batch_size", "smooth"):
        if getattr(arguments, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(arguments, key)}: at least 1")
    if arguments.smooth % 2 == 0:
        raise ValueError(f"--smooth {arguments.smooth}: an odd number of pixels")
    for name in arguments.methods:
        if name not in list_methods():
            raise ValueError(
                f"--methods {name}{suggest(name, list_methods())}; there are {join_words(list_methods(), 'and', 99)}"
            )
    if not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"--output {arguments.output}: no such folder")
    return {name: make_method(name) for name in arguments.methods}


def load_images(subject: Subject, arguments: argparse.Namespace) -> tuple[Tensor, list[int | None]]:
    """Return preprocessed images (N, 3, H, W) uint8, and labels."""
    samples: Sequence[tuple[Image.Image | Path, int | None]]
    samples = subject.val(arguments.n) if arguments.images is None else [(path, None) for path in arguments.images]
    crops = [subject.classifier.preprocess(image) for image, _ in samples]
    if len({crop.shape for crop in crops}) > 1:
        sizes = ", ".join("x".join(map(str, crop.shape[1:])) for crop in crops)
        raise ValueError(f"the images have different sizes ({sizes}), and the model's transform keeps them: crop them")
    return torch.stack(crops), [label for _, label in samples]


def draw(arguments: argparse.Namespace) -> None:
    """Draw and save the figure."""
    methods = check(arguments)
    if arguments.run is not None:
        subject = subject_of_run(arguments.run, arguments.checkpoint)
    else:
        subject = subject_of_model(arguments.model, arguments.weights, arguments.data)
    classifier = subject.classifier
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    model = classifier.model.to(auto if arguments.device == "auto" else arguments.device)
    pictures, labels = load_images(subject, arguments)
    with evaluating(model):
        x = classifier.encode(pictures)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(arguments.batch_size)])
        targets = select_classes(logits, labels, arguments.explain)
        columns: dict[str, Sequence[Tensor]] = {}
        if is_explainable(model) and x.shape[1] == 6:
            columns["B-cos in color"] = color_maps(model, x, targets, arguments.batch_size)
        for name, method in methods.items():
            if maps := compute_maps(name, method, model, x, targets, arguments.batch_size, arguments.smooth):
                columns[name] = maps
    if not columns:
        raise ValueError(f"none of the methods can explain {subject.title}")
    names, probabilities = classifier.class_names, classifier.to_probabilities(logits)
    rows = []
    for i, picture in enumerate(pictures):
        k = int(targets[i])
        note = f"{short(names[k])}, {float(probabilities[i, k]):.0%}"
        panels = [Panel(picture.permute(1, 2, 0).float() / 255, note), *(Panel(maps[i]) for maps in columns.values())]
        label = labels[i]
        rows.append(Row("" if label is None else f"label {short(names[label])}", panels))
    figure = map_table(["image, explained class", *columns], rows, subject.title)
    save_gallery(arguments.output, figure)
    print(f"written: {arguments.output}")


def short(name: str, length: int = 18) -> str:
    """Shorten a class name for the figure."""
    name = str(name).partition(",")[0].replace("_", " ")
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def main(argv: list[str] | None = None) -> int:
    try:
        draw(parser().parse_args(argv))
    except ValueError as error:
        print_line(" ".join(str(error).split()))
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
