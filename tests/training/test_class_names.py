"""A run knows its classes: where they are recorded, and where a data set's are compared with them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bcos_train import load
from bcos_train.config import UserError
from bcos_train.run import evaluate, train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.layout import CHECKPOINTS, LAST, WEIGHTS
from bcos_train.weights.export import export
from bcos_train.weights.files import read_file, save_weights

from .runs import compose, run_folder

NAMES = ("cat", "cow", "dog")
SETTINGS = (
    "dataset=imagefolder",
    "augmentation=plain",
    "explanation=none",
    "batch_size=3",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "num_workers=0",
    "schedule.warmup_epochs=0",
)


def write_images(root: Path, names: Sequence[str] = NAMES) -> Path:
    """Write two images per class; the class in NAMES of a folder is told by its color."""
    for part in ("train", "val"):
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                picture = np.full((16, 16, 3), 60 * label + 10 * i, np.uint8)
                Image.fromarray(picture).save(root / part / name / f"{i}.png")
    return root


def config(folder: Path, root: Path, *settings: str, **model: Any) -> dict[str, Any]:
    composed = compose(folder, *SETTINGS, f"dataset.root={root}", *settings)
    composed["model"] |= model
    return composed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    assert train(config(folder / "runs", write_images(folder / "images"))) == 0
    return run_folder(folder / "runs")


def forget_names(run: Path, folder: Path) -> Path:
    """Copy a run as earlier versions wrote it."""
    shutil.copytree(run, folder)
    save_weights(load(run).model, folder / WEIGHTS)
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        content = files.load(path)
        del content["class_names"]
        files.save(content, path)
    return folder


def test_names_belong_to_everything_that_holds_weights(run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "summary.json").read_text())["class_names"] == list(NAMES)
    assert files.load(run / CHECKPOINTS / LAST)["class_names"] == list(NAMES)
    export(str(run), tmp_path / "out")
    export(str(run), tmp_path / "file.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list(NAMES)
    assert '    0: "cat"\n    1: "cow"\n    2: "dog"\n' in (tmp_path / "out" / "README.md").read_text()
    assert load(run, checkpoint="best").class_names == NAMES
    for path in (run, run / WEIGHTS, run / CHECKPOINTS / LAST, tmp_path / "out", tmp_path / "file.safetensors"):
        assert read_file(path).class_names == NAMES
        classifier = load(path, model="resnet20")
        assert classifier.class_names == classifier.recorded_class_names == NAMES


def test_weights_without_names_load_as_before(run: Path, tmp_path: Path) -> None:
    old = forget_names(run, tmp_path / "old")
    export(str(run), tmp_path / "weights.pth")
    for path in (old, old / CHECKPOINTS / LAST, tmp_path / "weights.pth"):
        classifier = load(path, model="resnet20")
        assert classifier.class_names == ("class 0", "class 1", "class 2")
        assert classifier.recorded_class_names is None
    assert accuracy(tmp_path, old, write_images(tmp_path / "images", ("a", "b", "c")))


def accuracy(tmp_path: Path, run: Path, root: Path, class_map: object = None) -> dict[str, Any]:
    """Evaluate the run on a folder of images."""
    composed = compose(tmp_path, "dataset=imagefolder", f"dataset.root={root}", name="evaluate")
    composed |= {"run": str(run), "output": str(tmp_path / "out")}
    keys = ["run", "output", "dataset.root"]
    if class_map is not None:
        composed["dataset"]["class_map"] = class_map
        keys.append("dataset.class_map")
    assert evaluate(composed, keys) == 0
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return {key: content[key] for key in ("acc1", "loss", "count")}


def mistake(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_evaluation(run: Path, tmp_path: Path) -> None:
    expected = accuracy(tmp_path, run, write_images(tmp_path / "same"))
    # The same images under names whose order is another one.
    other = write_images(tmp_path / "other", ("tomcat", "cow", "dog"))
    message = mistake(accuracy, tmp_path, run, other)
    assert message.startswith("dataset: the classes are not those of ")
    assert ": class 0 is 'cow' in the data set, 'cat' in the model; rename the folders, or map each class" in message
    assert accuracy(tmp_path, run, other, {"tomcat": "cat"}) == pytest.approx(expected)
    part = write_images(tmp_path / "part", NAMES[:2])
    assert mistake(accuracy, tmp_path, run, part).endswith("dataset.class_map={} maps classes of the same name")
    assert accuracy(tmp_path, run, part, {})["count"] == 4


def test_resuming(run: Path, tmp_path: Path) -> None:
    """A class folder is renamed, and then one is added, between two starts."""
    settings = config(tmp_path / "runs", write_images(tmp_path / "images"), "trainer.max_epochs=2")
    assert train(settings) == 0
    folder = run_folder(tmp_path / "runs")
    (folder / "summary.json").unlink()
    for part in ("train", "val"):
        (tmp_path / "images" / part / "cow").rename(tmp_path / "images" / part / "cows")
    before = (folder / CHECKPOINTS / LAST).read_bytes()
    assert mistake(train, settings) == (
        "dataset: the classes are not those of this run: class 1 is 'cows' in the data set, 'cow' in the model; "
        "restore the class folders, or train another run with resume=false"
    )
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "images" / part / "cows", tmp_path / "images" / part / "cow")
    message = mistake(train, settings)
    assert "class 2 is 'cows' in the data set, 'dog' in the model (4 classes, the model has 3)" in message
    assert (folder / CHECKPOINTS / LAST).read_bytes() == before


def test_fine_tuning(run: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", ("tomcat", "cow", "dog"))
    message = mistake(train, config(tmp_path / "a", other, weights=str(run)))
    assert f"dataset: the classes are not those of {run}: class 0 is 'cow' in the data set, 'cat' in the" in message
    assert message.endswith(
        "to train other classes, use a file without class names (.pth) from scripts/export_weights.py"
    )
    mapped = config(tmp_path / "b", other, weights=str(run))
    mapped["dataset"]["class_map"] = {"tomcat": 0}
    assert train(mapped) == 0
    assert load(run_folder(tmp_path / "b")).class_names == NAMES
    # Another number of classes: a new classifier.
    assert train(config(tmp_path / "c", write_images(tmp_path / "two", ("x", "y")), weights=str(run))) == 0
    assert load(run_folder(tmp_path / "c")).class_names == ("x", "y")
    export(str(run), tmp_path / "weights.pth")
    assert train(config(tmp_path / "d", other, weights=str(tmp_path / "weights.pth"))) == 0
    assert load(run_folder(tmp_path / "d")).class_names == ("cow", "dog", "tomcat")


def test_a_map_needs_a_trained_model(tmp_path: Path) -> None:
    settings = config(tmp_path / "runs", write_images(tmp_path / "images"))
    settings["dataset"]["class_map"] = {}
    expected = "dataset.class_map: the class names of a model without trained weights are unknown"
    assert mistake(train, settings).startswith(expected)
