"""The command ``python scripts/compare_methods.py``."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    generator, paths = np.random.default_rng(0), []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_a_figure_of_a_model_and_image_files(
    script: ModuleType, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figure.png"
    methods = ["bcos", "guided_backprop", "ixg"]
    arguments = ["--model", "resnet20", "--weights", "random", "--images", *images, "--output", str(output)]
    assert script.main([*arguments, "--methods", *methods, "--explain", "3", "--smooth", "3"]) == 0
    picture = imread(output)
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.05
    said = capsys.readouterr()
    assert "guided_backprop: BcosResNet has no nn.ReLU" in said.err
    assert str(output) in said.out


def test_maps_are_the_methods(script: ModuleType) -> None:
    from bcos_train.explanation.method import make_method
    from bcos_train.model import create_model

    torch.manual_seed(0)
    model, x = create_model("resnet20").eval(), torch.rand(3, 6, 8, 8)
    targets, method = torch.tensor([1, 2, 3]), make_method("ixg")
    found = script.compute_maps("ixg", method, model, x, targets, batch_size=2, smooth=1)
    torch.testing.assert_close(torch.stack(found), method(model, x, targets[:, None])[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --run <run folder>, or --model <name>"),
        (["--run", "x", "--model", "resnet20"], "give --run <run folder>, or --model <name>"),
        (["--modle", "resnet20"], "--modle resnet20: no such option; did you mean --model?"),
        (["--model", "resnet5"], "unknown model 'resnet5'; did you mean resnet50?"),
        (["--model", "resnet20", "--methods", "int_gradd"], "--methods int_gradd; did you mean int_grad?"),
        (["--model", "resnet20", "--smooth", "2"], "--smooth 2: an odd number"),
        (["--model", "resnet20", "--n", "0"], "--n 0: at least 1"),
        (["--model", "resnet20", "--output", "none/x.png"], "--output none/x.png: no such folder"),
        (
            ["--model", "resnet20", "--weights", "random", "--images", "none.png"],
            "cannot read the image none.png: no such file",
        ),
        (["--model", "resnet20", "--weights", "random"], "resnet20 has 10 classes, which are not ImageNet's"),
        (["--model", "resnet20"], "resnet20 has no official weights"),
        (["--run", "/none"], "/none/config.yaml: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_take_one_line(
    script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_labels_and_classes(script: ModuleType) -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert script.select_classes(logits, [0, 0], "prediction").tolist() == [1, 0]
    assert script.select_classes(logits, [0, 1], "label").tolist() == [0, 1]
    assert script.select_classes(logits, [None, None], "1").tolist() == [1, 1]
    for which, message in (("labl", "did you mean label"), ("2", "there are classes 0 to 1"), ("label", "no labels")):
        with pytest.raises(ValueError, match=message):
            script.select_classes(logits, [None, None], which)


def test_classes_of_a_run_and_of_its_data_are_compared(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bcos_train.config import save
    from bcos_train.weights.files import save_weights

    monkeypatch.delenv("DATA_ROOT", raising=False)
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "0.png")
    dataset = {"_target_": "bcos_train.dataset.ImageFolder", "root": str(tmp_path)}
    transforms = {"_target_": "bcos_train.augmentation.Augmentation"}
    transforms |= {part: {"_target_": "bcos_train.augmentation.plain"} for part in ("train", "eval")}
    model = {"_target_": "bcos_train.model.create_model", "_partial_": True, "name": "resnet20", "num_classes": 2}
    encoding = {"_target_": "bcos_train.dataset.BcosEncoding"}
    config = {"model": model, "dataset": dataset, "augmentation": transforms, "encoding": encoding}
    save(config, tmp_path / "config.yaml")
    arguments = ["--run", str(tmp_path), "--checkpoint", str(tmp_path / "model.safetensors"), "--n", "1"]
    arguments += ["--methods", "bcos", "--output", str(tmp_path / "figure.png")]
    network = script.create_model("resnet20", num_classes=2)
    for names, code in ((("a", "b"), 0), (("b", "a"), 2), (None, 0)):
        save_weights(network, tmp_path / "model.safetensors", names)
        assert script.main(arguments) == code
        error = capsys.readouterr().err
        assert ("class 0 is 'a' in the data set, 'b' in the model" in error) == (code == 2)
