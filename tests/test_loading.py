"""One loader for runs, exports, weights files and official weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from weights.conftest import release, trained_run  # noqa: F401
from weights.release import Release, as_file, publish, state_of

from bcos_train import LoadedClassifier, create_model, explain, list_models, load
from bcos_train.explanation import is_explainable
from bcos_train.model import BcosModel
from bcos_train.weights.export import export
from bcos_train.weights.files import read_weights


def picture(width: int = 20, height: int = 18) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((width, height), 90) for _ in range(3)])


@pytest.fixture(scope="module")
def resnet20() -> LoadedClassifier:
    torch.manual_seed(0)
    return LoadedClassifier(create_model("resnet20"), "resnet20")


# ---- where classifiers come from


def test_run_folder(trained_run: Path) -> None:  # noqa: F811
    classifier = load(trained_run)
    assert (classifier.name, classifier.dataset) == ("resnet20", "digits")
    assert classifier.class_names == tuple("0123456789")
    assert classifier.origin == f"run {trained_run.name}, last.ckpt"
    assert not classifier.model.training
    assert classifier.model.fc.b == 1.5
    for use_ema in (False, True):
        state = load(str(trained_run), use_ema=use_ema).model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in read_weights(trained_run, use_ema)[0].items())


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_checkpoint_of_a_run(checkpoint: str, trained_run: Path) -> None:  # noqa: F811
    x = torch.rand(2, 6, 16, 16)
    classifier = load(trained_run, checkpoint=checkpoint, use_ema=False)
    assert classifier.model.fc.b == 1.5
    if checkpoint == "last":
        assert torch.equal(classifier.model(x), load(trained_run, use_ema=False).model(x))


@pytest.mark.parametrize(("loss", "activation"), [("CrossEntropy", "softmax"), ("BinaryCrossEntropy", "sigmoid")])
def test_probabilities_follow_the_loss(loss: str, activation: str, trained_run: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(trained_run, tmp_path / "run")
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["loss"] = {"_target_": f"bcos_train.loss.{loss}"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    export(str(tmp_path / "run"), tmp_path / "out")
    for folder in ("run", "out"):
        prediction = load(tmp_path / folder).predict(torch.rand(2, 6, 16, 16))
        expected = prediction.logits.softmax(1) if activation == "softmax" else prediction.logits.sigmoid()
        assert torch.equal(prediction.probabilities, expected)


def test_preprocessing_of_a_run(trained_run: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(trained_run, tmp_path / "run")
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["augmentation"]["eval"] = {"_target_": "bcos_train.augmentation.imagenet_eval", "crop_size": 48}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert load(tmp_path / "run").preprocess(picture()).shape == (3, 48, 48)
    config["augmentation"]["eval"] = {"_target_": "somewhere.else"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="the run's evaluation transform is not one of bcos_train"):
        load(tmp_path / "run")


def test_exported_folder(trained_run: Path, tmp_path: Path) -> None:  # noqa: F811
    names = [f"digit {i}" for i in range(10)]
    export(str(trained_run), tmp_path / "out", class_names=names, use_ema=False)
    classifier, of_run = load(tmp_path / "out"), load(trained_run, use_ema=False)
    assert list(classifier.class_names) == names
    image = picture()
    assert torch.equal(classifier.predict(image).logits, of_run.predict(image).logits)
    x = torch.rand(2, 6, 16, 16)
    assert torch.equal(classifier.model(x), of_run.model(x))


def test_usage_in_the_model_card_works(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    export(str(trained_run), tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    picture().save("image.jpg")
    values: dict[str, Any] = {}
    exec(code, values)
    assert values["explanation"].weights.shape == (1, 6, 18, 20)


def test_weights_file_and_model_name(tmp_path: Path) -> None:
    state = state_of("resnet20", num_classes=3, b=1.5)
    torch.save(state, tmp_path / "w.pth")
    classifier = load(tmp_path / "w.pth", model="resnet20", options={"b": 1.5})
    assert (classifier.model.num_classes, classifier.model.fc.b) == (3, 1.5)
    assert classifier.class_names == ("class 0", "class 1", "class 2")
    assert load(tmp_path / "w.pth", model="resnet20", class_names="abc").class_names == ("a", "b", "c")


@pytest.mark.parametrize("source", ["resnet18", "official:resnet18"])
def test_official_weights(source: str, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    state = state_of("resnet18")
    record = publish(monkeypatch, "resnet18", as_file(state))
    release.files[record.file] = as_file(state)
    classifier = load(source, progress=False)
    assert torch.equal(classifier.model.fc.linear.weight, state["fc.linear.weight"])
    assert (classifier.dataset, classifier.class_names[0]) == ("imagenet", "tench")
    assert classifier.preprocess(picture()).shape == (3, 224, 224)


def test_timm_model(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "w.pth")
    classifier = load(tmp_path / "w.pth", model="timm:resnet10t")
    prediction = classifier.predict(picture())
    assert prediction.probabilities.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="timm:resnet10t is not a B-cos network, so it has no W"):
        classifier.explain(picture())
    with pytest.raises(ValueError, match="which takes PIL images or paths, not uint8 tensors"):
        classifier.predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ("resnet20", {}, "resnet20 has no official weights; near it, resnet"),
        ("resnet5", {}, "resnet5: no such file, folder or model; did you mean resnet50?"),
        ("{tmp}/w.pth", {}, 'w.pth doesn\'t specify its model: set model="NAME"'),
        ("{tmp}/w.pth", {"model": "resnet2O"}, "unknown model 'resnet2O'; did you mean resnet20?"),
        ("{tmp}/w.pth", {"model": "resnet32"}, "w.pth doesn't fit the model: "),
        ("{tmp}/w.pth", {"model": "resnet20", "options": {"maxout": 2}}, "no option 'maxout'; did you mean max_out?"),
        ("{tmp}/w.pth", {"model": "resnet20", "class_names": "ab"}, "2 class names, but resnet20 has 10 classes"),
        ("{tmp}/w.pth", {"checkpoint": "best"}, "checkpoint=best needs a run folder, and "),
        ("{tmp}", {}, "holds no model.safetensors"),
        ("{tmp}/text.pth", {"model": "resnet20"}, "text.pth is not a weights file, or only part of one"),
    ],
)
def test_mistakes(source: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(state_of("resnet20"), tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError) as caught:
        load(source.format(tmp=tmp_path), **keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- images


def test_images_in_every_form(resnet20: LoadedClassifier, tmp_path: Path) -> None:
    first, second = picture(), picture()
    first.save(tmp_path / "first.png")
    second.convert("RGBA").save(tmp_path / "second.png")
    x = torch.stack([resnet20.model.transform(image) for image in (first, second)])
    with torch.no_grad():
        expected = resnet20.model(x)
    crops = torch.stack([resnet20.preprocess(image) for image in (first, second)])
    assert (crops.dtype, crops.shape) == (torch.uint8, (2, 3, 18, 20))
    for images in ([first, second], [tmp_path / "first.png", str(tmp_path / "second.png")], crops, x):
        assert torch.equal(resnet20.predict(images).logits, expected)
    assert resnet20.predict(first).logits.shape == resnet20.predict(str(tmp_path / "first.png")).logits.shape == (1, 10)


def test_prediction(resnet20: LoadedClassifier) -> None:
    prediction = resnet20.predict([picture(), picture()])
    assert torch.equal(prediction.probabilities, prediction.logits.sigmoid())
    assert torch.equal(prediction.classes, prediction.logits.argmax(1))
    first, second = prediction.top(3)
    assert len(first) == len(second) == 3
    assert first[0] == (f"class {int(prediction.classes[0])}", float(prediction.probabilities[0].max()))
    assert first[0][1] >= first[1][1] >= first[2][1]
    assert not prediction.logits.requires_grad


@pytest.mark.parametrize("target", [None, 3, torch.tensor([1, 2])], ids=["predicted", "one", "each"])
def test_explanation(target: Any, resnet20: LoadedClassifier) -> None:
    images = [picture(), picture()]
    x = resnet20.prepare(images)
    result, expected = resnet20.explain(images, target), explain(resnet20.model, x, target)
    assert torch.equal(result.weights, expected.weights)
    assert torch.equal(result.target, expected.target)
    assert result.contribution_map.shape == (2, 18, 20)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere.png", "cannot read the image nowhere.png: no such file"),
        (__file__, "test_loading.py: not an image"),
        ([picture(20, 18), picture(18, 20)], "images must have the same size after the preprocessing of resnet20, got"),
        ([], "no images: expected at least one"),
        ([3], "an image is a PIL image or a path, got int"),
        (torch.rand(2, 3, 8, 8), "must be uint8 (N, 3, H, W) or float (N, 6, H, W), N >= 1, got torch.float32 (2, "),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "got torch.uint8 (3, 8, 8)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "got torch.int64 (2, 3, 8, 8)"),
        (torch.zeros(0, 6, 8, 8), "got torch.float32 (0, 6, 8, 8)"),
    ],
    ids=["no file", "no image", "sizes", "none", "type", "channels", "dimensions", "dtype", "empty"],
)  # fmt: skip
def test_wrong_images(images: Any, message: str, resnet20: LoadedClassifier) -> None:
    with pytest.raises(ValueError) as caught:
        resnet20.predict(images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_standard_model() -> None:
    classifier = LoadedClassifier(create_model("standard_resnet18", num_classes=4), "standard_resnet18")
    images = [picture(300, 260)]
    x = classifier.prepare(images)
    assert torch.equal(x[0], classifier.model.transform(images[0]))
    assert classifier.predict(images).probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", list_models())
def test_is_explainable(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert is_explainable(model) == isinstance(model, BcosModel)


def test_explicit_encoding() -> None:
    """It applies to uint8 images, and models need neither a transform nor a number of classes then."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    classifier = LoadedClassifier(model, "linear", ("cat", "dog"), encoding=lambda images: images / 255 - 1)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(classifier.encode(images), images / 255 - 1)
    assert torch.equal(classifier.encode(images / 255), images / 255)
    assert classifier.predict(images).top(1)[0][0][0] in ("cat", "dog")


def test_wrong_number_of_class_names() -> None:
    with pytest.raises(ValueError, match="1 class names, but resnet20 has 10 classes"):
        LoadedClassifier(create_model("resnet20"), "resnet20", ("cat",))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation='relu': sigmoid or softmax"):
        LoadedClassifier(create_model("resnet20"), "resnet20", activation="relu")


def test_config_of_an_export_without_a_preprocessing(trained_run: Path, tmp_path: Path) -> None:  # noqa: F811
    export(str(trained_run), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["preprocessing"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "out").preprocess(picture()).shape == (3, 18, 20)
