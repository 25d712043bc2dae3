"""A figure that compares explanation methods: rows are images, columns are methods.

python scripts/compare_methods.py --run runs/digits/resnet20/default-…             # validation images of the run
python scripts/compare_methods.py --run … --methods bcos int_grad rise --n 8 --explain label
python scripts/compare_methods.py --model resnet50 --images dog.jpg cat.jpg        # official weights, any image files
python scripts/compare_methods.py --model resnet50 --weights my.pth --data $IMAGENET_PATH

Red speaks for the class that is explained, blue against it; each map has its own symmetric scale. For B-cos networks
the colour explanation comes first: W(x), each pixel in the colour that it looks for.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from bcos_train.command_line import MISTAKE, Parser
from bcos_train.explanation import color_explanation, evaluating, explain
from bcos_train.explanation.method import CannotExplain, Method, list_methods, make_method
from bcos_train.explanation.method.base import probabilities
from bcos_train.model import BcosModel, create_model
from bcos_train.model.registry import find_weights
from bcos_train.model.weights import load_weights
from bcos_train.report import Panel, Row, map_table, save_gallery
from bcos_train.suggest import join_words, suggest

DEFAULT_METHODS = ("bcos", "ixg", "gradient", "int_grad", "guided_backprop", "grad_cam")
RANDOM, PREDICTION, LABEL = "random", "prediction", "label"
#: Pixels at a height of 224 that opacity is averaged over, as in the papers' figures; in proportion otherwise.
SMOOTH = 15


def parser() -> Parser:
    result = Parser(__doc__)
    add = result.add_argument
    add("--run", type=Path, metavar="FOLDER", help="a run folder: its model, its data and their transforms")
    add("--checkpoint", default="best", help="of the run: best (default), last or a path")
    add("--model", metavar="NAME", help="without a run: one of bcos_train.list_models()")
    add("--weights", default="official", help="of the model: official (default), random, or a path")
    add("--images", nargs="+", type=Path, metavar="FILE", help="image files; without them, validation images")
    add("--data", type=Path, help="of the model: ImageNet's folder, that holds val/ (default: $IMAGENET_PATH)")
    add("--n", type=int, default=6, help="how many validation images (default: 6)")
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=", ".join(list_methods()))
    add("--explain", default=PREDICTION, metavar="CLASS", help="prediction (default), label, or a class index")
    add("--smooth", type=int, default=1, help="odd width in pixels of the average over a map (default: 1, none)")
    add("--batch-size", type=int, default=8, help="images explained at once (default: 8)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--output", type=Path, default=Path("comparison.png"), help="the figure (default: comparison.png)")
    return result


@dataclass
class Network:
    """A model in evaluation mode, and how images get into it.

    Attributes:
        crop: PIL image -> uint8 (3, H, W), what the model is to see.
        encode: uint8 (N, 3, H, W) -> the model's input.
        names: of the classes.
        val: the validation images, if there are any: gives a list of PIL images with labels.
    """

    title: str
    model: nn.Module
    crop: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]
    names: Sequence[str]
    val: Callable[[int], list[tuple[Image.Image, int]]]


def network_of_run(folder: Path, checkpoint: str) -> Network:
    """What a run trained, with its evaluation transform."""
    from bcos_train.config import instantiate, load, user_errors_at
    from bcos_train.training.checkpointer import find_checkpoint
    from bcos_train.training.run_folder import CHECKPOINTS, CONFIG

    config = load(folder / CONFIG)
    # What training began with isn't fetched: it would be overwritten.
    config["model"] = {key: value for key, value in config["model"].items() if key not in ("pretrained", "weights")}
    parts = {key: instantiate(config[key], path=key) for key in ("model", "dataset", "augmentation", "encoding")}
    name, dataset = config["model"]["name"], parts["dataset"]
    with user_errors_at(""):
        state, _, origin = find_weights(name, find_checkpoint(folder / CHECKPOINTS, checkpoint))
        num_classes = parts["model"].keywords.get("num_classes") or dataset.num_classes
        model = parts["model"](num_classes=num_classes)
        load_weights(model, state, origin)
    names = [*dataset.class_names, *(f"class {k}" for k in range(dataset.num_classes, num_classes))]
    title = f"{name} on {dataset.name}"
    return Network(title, model, parts["augmentation"].eval, parts["encoding"], names, lambda n: val_images(dataset, n))


def network_by_name(name: str, weights: str, data: Path | None) -> Network:
    """A model with the inference transform that belongs to it."""
    torch.manual_seed(0)  # of random weights
    model = create_model(name, weights=None if weights == RANDOM else weights)
    transform: Any = getattr(model, "transform", None)
    num_classes = int(getattr(model, "num_classes", 0))
    folder = data or os.environ.get("IMAGENET_PATH")

    def val(n: int) -> list[tuple[Image.Image, int]]:
        if num_classes != 1000:
            raise ValueError(f"{name} has {num_classes} classes, which are not ImageNet's: give --images")
        if not folder:
            raise ValueError("no images: give --images, or --data (or IMAGENET_PATH) for validation images")
        from bcos_train.dataset import ImageNet

        return val_images(ImageNet(folder), n)

    names = [f"class {k}" for k in range(num_classes)]
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    title = f"{name}, {weights} weights" if weights in (RANDOM, "official") else name
    return Network(title, model, lambda image: transform.geometry(image), transform.encoding, names, val)


def val_images(dataset: Any, n: int) -> list[tuple[Image.Image, int]]:
    """The first images of a fixed permutation, those that the galleries show."""
    from bcos_train.dataset.randomness import Stream, permutation

    part = dataset.val()
    return [part[i] for i in permutation(len(part), 0, Stream.SUBSET, 1)[:n].tolist()]


def read_images(paths: Sequence[Path]) -> list[tuple[Image.Image, int | None]]:
    images: list[tuple[Image.Image, int | None]] = []
    for path in paths:
        try:
            images.append((Image.open(path).convert("RGB"), None))
        except FileNotFoundError:
            raise ValueError(f"--images {path}: no such file") from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"--images {path}: not an image ({error})") from None
    return images


def chosen_classes(logits: Tensor, labels: Sequence[int | None], which: str) -> Tensor:
    """The class that is explained for each image: (N,)."""
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


def maps_of(
    name: str, method: Method, model: nn.Module, x: Tensor, targets: Tensor, batch_size: int, smooth: int
) -> Sequence[Tensor]:
    """A signed map (H, W) for each image; none if the method doesn't fit the model, and a line that says why."""
    print(f"{name} …", file=sys.stderr)
    parts = []
    try:
        for images, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
            maps = method(model, images, classes[:, None])
            parts.append(F.avg_pool2d(maps, smooth, stride=1, padding=smooth // 2)[:, 0].cpu())
    except (CannotExplain, ModuleNotFoundError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return []
    return torch.cat(parts).unbind()


def colours(model: nn.Module, x: Tensor, targets: Tensor, batch_size: int) -> list[Tensor]:
    """The colour explanation of each image on white: (H, W, 3)."""
    window = max(1, 2 * round((SMOOTH * x.shape[2] / 224 - 1) / 2) + 1)
    found: list[Tensor] = []
    for images, classes in zip(x.split(batch_size), targets.split(batch_size), strict=True):
        rgba = color_explanation(images, explain(model, images, classes).weights, window).cpu()
        found += (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]).unbind()
    return found


def check(arguments: argparse.Namespace) -> dict[str, Method]:
    """The methods by name.

    Raises:
        ValueError: an argument is wrong; the message is for the user.
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


def load_images(network: Network, arguments: argparse.Namespace) -> tuple[Tensor, list[int | None]]:
    """uint8 (N, 3, H, W) and labels."""
    samples = network.val(arguments.n) if arguments.images is None else read_images(arguments.images)
    crops = [network.crop(image) for image, _ in samples]
    if len({crop.shape for crop in crops}) > 1:
        sizes = ", ".join("x".join(map(str, crop.shape[1:])) for crop in crops)
        raise ValueError(f"the images have different sizes ({sizes}), and the model's transform keeps them: crop them")
    return torch.stack(crops), [label for _, label in samples]


def draw(arguments: argparse.Namespace) -> None:
    methods = check(arguments)
    if arguments.run is not None:
        network = network_of_run(arguments.run, arguments.checkpoint)
    else:
        network = network_by_name(arguments.model, arguments.weights, arguments.data)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if arguments.device == "auto" else arguments.device)
    model = network.model.to(device)
    pictures, labels = load_images(network, arguments)
    with evaluating(model):
        x = network.encode(pictures).to(device)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(arguments.batch_size)])
        targets = chosen_classes(logits, labels, arguments.explain)
        columns: dict[str, Sequence[Tensor]] = {}
        if isinstance(model, BcosModel) and x.shape[1] == 6:
            columns["B-cos in colour"] = colours(model, x, targets, arguments.batch_size)
        for name, method in methods.items():
            if maps := maps_of(name, method, model, x, targets, arguments.batch_size, arguments.smooth):
                columns[name] = maps
    if not columns:
        raise ValueError(f"none of the methods can explain {network.title}")
    shares = probabilities(model)(logits)
    rows = []
    for i, picture in enumerate(pictures):
        k = int(targets[i])
        note = f"{short(network.names[k])}, {float(shares[i, k]):.0%}"
        panels = [Panel(picture.permute(1, 2, 0).float() / 255, note)]
        panels += [Panel(maps[i]) for maps in columns.values()]
        label = labels[i]
        rows.append(Row("" if label is None else f"label {short(network.names[label])}", panels))
    figure = map_table(["image, class explained", *columns], rows, network.title)
    save_gallery(arguments.output, figure)
    print(f"written: {arguments.output}")


def short(name: str, length: int = 18) -> str:
    name = str(name).partition(",")[0].replace("_", " ")
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def main(argv: list[str] | None = None) -> int:
    try:
        draw(parser().parse_args(argv))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
