"""Weights keep the options that they were trained with, for every file of a run or an export."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bcos_train import create_model
from bcos_train.runs import checkpoint
from bcos_train.weights.export import export
from bcos_train.weights.files import save_weights

from .states import assert_same, random_state, seeded


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A folder of weights of a ResNet-20 with B = 1.5 and three classes, as an export describes it."""
    save_weights(create_model("resnet20", b=1.5, num_classes=3), tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    config = {
        "library_name": "bcos-train",
        "model_name": "resnet20",
        "model_args": {"b": 1.5, "logit_bias": 0.5},
        "num_classes": 3,
        "averaged": False,
        "sha256": digest,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_describes_the_options_of_its_weights(described: Path) -> None:
    model = create_model("resnet20", weights=described)
    assert (model.fc.b, model.logit_layer.logit_bias, model.num_classes) == (1.5, 0.5, 3)
    assert create_model("resnet20", weights=described, b=1.5).fc.b == 1.5
    assert create_model("resnet20", weights=described, num_classes=7).num_classes == 7


def write_described_run(folder: Path, **options: Any) -> Path:
    """A run of a ResNet-20 with these options, both as a finished run's weights and as a checkpoint."""
    folder.mkdir()
    state = random_state("resnet20", **options)
    for file in ("model.safetensors", "model_ema.safetensors"):
        save_file(state, folder / file)
    checkpoint.save({"model": state}, folder / "checkpoints" / "last.ckpt")
    options.pop("num_classes", None)
    model = {"_target_": "bcos_train.model.create_model", "_partial_": True, "name": "resnet20", **options}
    (folder / "config.yaml").write_text(
        json.dumps({"model": {**model, "weights": "other.pth"}, "dataset": {"_target_": "a.Digits"}})
    )
    return folder


PARTS = ("", "model.safetensors", "model_ema.safetensors", "checkpoints/last.ckpt")


@pytest.mark.parametrize("part", PARTS)
def test_a_run_folder_describes_all_its_weights(part: str, tmp_path: Path) -> None:
    assert create_model("resnet20", weights=write_described_run(tmp_path / "run", b=1.5) / part).fc.b == 1.5


def test_an_exported_folder_describes_its_file(described: Path) -> None:
    assert create_model("resnet20", weights=described / "model.safetensors").fc.b == 1.5


@pytest.mark.parametrize("part", PARTS)
def test_other_options_than_the_trained_ones(part: str, tmp_path: Path) -> None:
    path = write_described_run(tmp_path / "run", b=1.5) / part
    with pytest.raises(ValueError, match="were trained") as caught:
        create_model("resnet20", weights=path, b=2)
    assert str(caught.value) == (
        f"weights={path} were trained with b=1.5, the model has b=2: set b=1.5 (on the command line model.b=1.5); "
        "if the difference is intended, use a bare weights file, as written by scripts/export_weights.py (.pth)"
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", PARTS)
def test_a_bare_file_takes_any_option(part: str, suffix: str, tmp_path: Path) -> None:
    """The way out that the message above names."""
    bare = tmp_path / f"bare{suffix}"
    export(str(write_described_run(tmp_path / "run", b=1.5) / part), bare)
    model = create_model("resnet20", weights=bare, b=1.25, logit_bias=0.5)
    assert (model.fc.b, model.logit_layer.logit_bias) == (1.25, 0.5)
    assert_same(dict(model.state_dict()), random_state("resnet20", b=1.5))


def test_a_missing_option_has_its_default(tmp_path: Path) -> None:
    path = write_described_run(tmp_path / "run")
    assert create_model("resnet20", weights=path, b=2).fc.b == 2
    with pytest.raises(ValueError, match=r"were trained with b=2, the model has b=1\.5: set b=2 "):
        create_model("resnet20", weights=path, b=1.5)


def test_options_of_training_are_free(tmp_path: Path) -> None:
    path = write_described_run(tmp_path / "run", stochastic_depth_prob=0.1)
    create_model("resnet20", weights=path, stochastic_depth_prob=0.0, num_classes=3)


def test_number_of_classes_is_counted_if_a_run_does_not_specify_it(tmp_path: Path) -> None:
    path = write_described_run(tmp_path / "run", num_classes=3)
    state = load_file(path / "model.safetensors")
    assert_same(dict(seeded("resnet20", weights=path).state_dict()), state)
    drawn = torch.rand(1)
    seeded("resnet20", num_classes=3)
    assert torch.equal(drawn, torch.rand(1))
    model = seeded("resnet20", weights=path, num_classes=7)
    assert torch.equal(model.fc.linear.weight, seeded("resnet20", num_classes=7).fc.linear.weight)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_described_run(tmp_path / "run", b=1.5)
    assert create_model("resnet20", weights="~/run").fc.b == 1.5


def test_an_unfinished_run(tmp_path: Path) -> None:
    path = write_described_run(tmp_path / "run")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the run has not finished.*such as .*checkpoints/last\.ckpt"):
        create_model("resnet20", weights=path)


def test_a_folder_of_another_model(described: Path) -> None:
    with pytest.raises(ValueError, match=r"holds weights of resnet20, not of resnet32"):
        create_model("resnet32", weights=described)


@pytest.mark.parametrize("text", ["{", "[]", '{"library_name": "bcos-train"}'])
def test_a_damaged_description(described: Path, text: str) -> None:
    (described / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json(: not a| is not the config of an exported folder|: Expecting)"):
        create_model("resnet20", weights=described)


def test_a_config_of_another_program_is_ignored(described: Path) -> None:
    (described / "config.json").write_text('{"architecture": "resnet20"}')
    assert create_model("resnet20", weights=described, num_classes=3).fc.b == 2


def test_a_config_of_another_program_beside_a_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("architecture: resnet20\n")
    torch.save(random_state("resnet20"), tmp_path / "w.pth")
    assert create_model("resnet20", weights=tmp_path / "w.pth").fc.b == 2


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_description_is_no_weights_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} only describes weights: give its folder, {tmp_path}$"):
        create_model("resnet20", weights=tmp_path / name)
