"""Weights convert between all formats bit for bit, and folders describe their content."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from bcos_train import create_model, load
from bcos_train.dataset import Cifar10
from bcos_train.weights import run_source
from bcos_train.weights.export import export
from bcos_train.weights.files import read_weights, save_weights

from .exports import assert_equal, state_in, training_checkpoint
from .release import Release, as_file, publish, state_of

#: Options that change the output, but no shape.
OPTIONS = {"b": 1.5, "max_out": 2, "logit_bias": -1.0}


# ---- there and back


@pytest.mark.parametrize("is_ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("source", ["folder", "last.ckpt", "safetensors"])
@pytest.mark.parametrize("target", ["w.pth", "w.safetensors", "folder"])
def test_from_a_run(source: str, target: str, is_ema: bool, trained_run: Path, tmp_path: Path) -> None:
    file = "model_ema.safetensors" if is_ema else "model.safetensors"
    path = {"folder": "", "last.ckpt": "checkpoints/last.ckpt", "safetensors": file}[source]
    done = export(str(trained_run / path), tmp_path / target, use_ema=is_ema)
    assert done.path == tmp_path / target
    assert done.source.model_name == "resnet20"
    assert done.source.is_ema == is_ema
    assert done.source.options["b"] == 1.5
    assert done.source.options["num_classes"] == 10
    assert_equal(read_weights(tmp_path / target)[0], state_in(trained_run, is_ema))
    assert [path.name for path in tmp_path.iterdir()] == [target]


def test_plain_and_averaged_differ_and_the_average_is_the_default(trained_run: Path, tmp_path: Path) -> None:
    plain, averaged = (state_in(trained_run, is_ema) for is_ema in (False, True))
    assert any(not torch.equal(plain[key], averaged[key]) for key in plain)
    assert export(str(trained_run), tmp_path / "w.pth").source.is_ema


FORMS = ("a.pth", "b.safetensors", "c")


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_between_all_forms(first: str, second: str, tmp_path: Path) -> None:
    state = state_of("resnet20", **OPTIONS)
    torch.save(state, tmp_path / "start.pth")
    told = {"model": "resnet20", "options": OPTIONS}
    export(str(tmp_path / "start.pth"), tmp_path / "1" / first, **told)
    export(str(tmp_path / "1" / first), tmp_path / "2" / second, **({} if first == "c" else told))
    assert_equal(read_weights(tmp_path / "2" / second)[0], state)
    assert_equal(create_model("resnet20", weights=tmp_path / "2" / second, **OPTIONS).state_dict(), state)


def test_the_exported_model_is_the_trained_one(trained_run: Path, tmp_path: Path) -> None:
    export(str(trained_run), tmp_path / "out", use_ema=False)
    x = torch.rand(2, 6, 16, 16)
    shutil.copy(trained_run / "model.safetensors", tmp_path / "w.safetensors")
    expected = create_model("resnet20", weights=tmp_path / "w.safetensors", b=1.5).eval()(x)
    assert torch.equal(load(tmp_path / "out").model.eval()(x), expected)
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors", trained_run / "model.safetensors"):
        assert torch.equal(create_model("resnet20", weights=path).eval()(x), expected)
    other_b = create_model("resnet20", weights=tmp_path / "w.safetensors").eval()(x)
    assert not torch.allclose(other_b, expected), "b must matter for this test to say something"


@pytest.mark.parametrize(
    ("suffix", "is_ema"), [(".ckpt", None), (".ckpt", False), (".pth", True)], ids=["default", "plain", "ema, renamed"]
)
def test_from_the_official_training_code(suffix: str, is_ema: bool | None, tmp_path: Path) -> None:
    plain = state_of("resnet18")
    averaged = {key: value * 2 for key, value in plain.items()}
    path = tmp_path / f"epoch=89{suffix}"
    torch.save(training_checkpoint(plain, averaged), path)
    with pytest.warns(UserWarning, match="averaged ones") if is_ema is None else contextlib.nullcontext():
        done = export(str(path), tmp_path / "out", use_ema=is_ema)
    assert (done.source.model_name, done.source.dataset) == ("resnet18", "imagenet")
    assert_equal(load(tmp_path / "out").model.state_dict(), plain if is_ema is False else averaged)


def test_official_vit_keys_keep_their_zero(tmp_path: Path) -> None:
    state = state_of("vitc_ti_patch1_14", dim=16, heads=1, mlp_dim=16, depth=1)
    content = training_checkpoint(state, hyper_parameters={})
    torch.save(content, tmp_path / "a.ckpt")
    options = {"dim": 16, "heads": 1, "mlp_dim": 16, "depth": 1}
    export(str(tmp_path / "a.ckpt"), tmp_path / "a.pth", model="vitc_ti_patch1_14", options=options)
    read = read_weights(tmp_path / "a.pth")[0]
    assert all(key.startswith("0.") for key in read)
    assert_equal(read, state)


def test_official_row(release: Release, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = state_of("resnet18")
    row = publish(monkeypatch, "resnet18", as_file(state))
    release.files[row.file] = as_file(state)
    done = export("official:resnet18", tmp_path / "out")
    assert_equal(load(tmp_path / "out").model.state_dict(), state)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["license"] == "apache-2.0"
    assert config["is_official"] is True
    assert len(config["label_names"]) == 1000
    assert config["pretrained_cfg"]["input_size"] == [6, 224, 224]
    # Back to a file as the official ones are; by its name, which has to be deserved, it is known again.
    (tmp_path / row.file).write_bytes(as_file(state))
    again = export(str(tmp_path / row.file), tmp_path / "again.pth")
    assert (again.source.is_official, again.source.license) == (True, "apache-2.0")
    assert done.source.model_name == again.source.model_name == "resnet18"
    (tmp_path / row.file).write_bytes(as_file({**state, "fc.linear.weight": state["fc.linear.weight"] + 1}))
    with pytest.raises(ValueError, match="doesn't specify its model: set --model NAME"):
        export(str(tmp_path / row.file), tmp_path / "other.pth")


def test_hash_in_the_name(trained_run: Path, tmp_path: Path) -> None:
    done = export(str(trained_run), tmp_path / "resnet_20.pth", with_hash=True)
    digest = hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert done.path.name == f"resnet_20-{digest[:10]}.pth"
    assert done.sha256 == digest
    content = torch.load(done.path, weights_only=True)
    assert type(content) is dict
    assert list(content) == list(create_model("resnet20").state_dict())
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in content.values())


def test_views_and_channels_last_are_written_contiguously(tmp_path: Path) -> None:
    state = state_of("resnet20")
    strange = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    key = next(k for k, v in state.items() if v.ndim == 1)
    strange[key] = torch.zeros(10**7)[: len(state[key])].copy_(state[key])
    torch.save(strange, tmp_path / "strange.pth")
    done = export(str(tmp_path / "strange.pth"), tmp_path / "plain.pth", model="resnet20")
    assert done.path.stat().st_size < 4 * 10**6
    assert_equal(torch.load(done.path, weights_only=True), state)


def test_classes_are_counted(tmp_path: Path) -> None:
    """With MaxOut 2 the classifier has two rows for each class."""
    torch.save(state_of("resnet20", num_classes=7), tmp_path / "seven.pth")
    assert export(str(tmp_path / "seven.pth"), tmp_path / "out", model="resnet20").source.options["num_classes"] == 7
    assert load(tmp_path / "out").model.num_classes == 7


def test_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    save_weights(model, tmp_path / "w.safetensors")
    export(str(tmp_path / "w.safetensors"), tmp_path / "out", model="timm:resnet10t")
    assert_equal(load(tmp_path / "out").model.state_dict(), model.state_dict())
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_equal(by_timm.state_dict(), model.state_dict())


def test_timm_reads_the_folder(trained_run: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("bcos_train.timm")
    export(str(trained_run), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.rand(2, 6, 16, 16)
    assert torch.equal(model(x), load(tmp_path / "out").model.eval()(x))


# ---- what the folder says


def front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert "## Use" in body
    content: dict[str, Any] = yaml.safe_load(head)
    assert ModelCard.load(folder / "README.md").data.to_dict() == content
    return content


def test_model_card(trained_run: Path, tmp_path: Path) -> None:
    export(str(trained_run), tmp_path / "out", license="cc-by-4.0", use_ema=False)
    card = front_matter(tmp_path / "out")
    assert card["license"] == "cc-by-4.0"
    assert card["library_name"] == "bcos-train"
    assert "image-classification" in card["tags"]
    (result,) = card["model-index"][0]["results"]
    logged = json.loads((trained_run / "summary.json").read_text())["metrics"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values == {"top-1 accuracy [%]": logged["val/acc1"], "top-5 accuracy [%]": logged["val/acc5"]}
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "validation", "args": {"images": 8}}


def test_no_license_is_invented(trained_run: Path, tmp_path: Path) -> None:
    export(str(trained_run), tmp_path / "out")
    assert "license" not in front_matter(tmp_path / "out")
    assert "No license has been chosen" in (tmp_path / "out" / "README.md").read_text()
    assert "license" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_file_alone_has_no_results(tmp_path: Path) -> None:
    torch.save(state_of("resnet20"), tmp_path / "w.pth")
    export(str(tmp_path / "w.pth"), tmp_path / "out", model="resnet20")
    assert "model-index" not in front_matter(tmp_path / "out")
    assert "None are recorded" in (tmp_path / "out" / "README.md").read_text()


def test_results_are_those_of_the_same_weights(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    (best,) = (folder / "checkpoints").glob("epoch-*.ckpt")
    assert export(str(best), tmp_path / "a.pth").source.metrics == {}
    found = {"weights": str(best), "ema": True, "acc1": 12.5, "acc5": 50.0, "loss": 0.3, "count": 8.0}
    (folder / "evaluation.json").write_text(json.dumps(found))
    assert export(str(best), tmp_path / "b.pth").source.metrics == {"acc1": 12.5, "acc5": 50.0, "loss": 0.3}
    assert export(str(best), tmp_path / "c.pth", use_ema=False).source.metrics == {}
    assert export(str(folder), tmp_path / "d.pth").source.metrics["acc1"] != 12.5


def test_changed_options_drop_the_results(trained_run: Path, tmp_path: Path) -> None:
    same = export(str(trained_run), tmp_path / "a", options={"b": 1.5, "stochastic_depth_prob": 0.0}).source
    assert same.metrics
    other = export(str(trained_run), tmp_path / "b", options={"b": 2}).source
    assert (other.options["b"], other.metrics, other.n_images) == (2, {}, None)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_args"]["b"] == 2
    assert "metrics" not in config or config["metrics"] == {}


def test_an_exported_folder_keeps_its_description(trained_run: Path, tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(10)]
    export(str(trained_run), tmp_path / "1", license="mit", class_names=names)
    export(str(tmp_path / "1"), tmp_path / "2")
    for file in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
    assert json.loads((tmp_path / "2" / "config.json").read_text())["label_names"] == names


def test_preprocessing_is_that_of_the_run(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["augmentation"]["eval"] = {"_target_": "bcos_train.augmentation.imagenet_eval", "crop_size": 48}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    export(str(folder), tmp_path / "out")
    from PIL import Image

    image = Image.new("RGB", (80, 90))
    assert load(tmp_path / "out").model.transform(image).shape == (6, 48, 48)
    for path in (folder, folder / "checkpoints" / "last.ckpt", tmp_path / "out"):
        assert create_model("resnet20", weights=path).transform(image).shape == (6, 48, 48)
    assert "shorter side to 256 pixels" in (tmp_path / "out" / "README.md").read_text()


def test_class_names_of_cifar10() -> None:
    assert list(run_source._CIFAR10_CLASSES) == Cifar10("anywhere").class_names


def test_safetensors_metadata(trained_run: Path, tmp_path: Path) -> None:
    """They name torch, which other readers expect, and the classes."""
    export(str(trained_run), tmp_path / "out")
    for folder in (trained_run, tmp_path / "out"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "class_names": json.dumps(list("0123456789"))}
