"""Training and evaluating with official weights, starting from configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import compose, run_folder

from bcos_train import create_model
from bcos_train.config import UserError, check
from bcos_train.run import evaluate, train
from bcos_train.training.config import EvaluateConfig, TrainConfig
from bcos_train.weights.files import read_weights

from .release import Release, as_file, publish, state_of

SMALL = ("dataset.size=32", "limit_train=8", "limit_val=8", "batch_size=4", "trainer.accelerator=cpu", "num_workers=0")
QUIET = ("trainer.progress=false", "explanation=none", "trainer.max_epochs=1")


def publish_state(release: Release, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any]) -> None:
    content = as_file(state)
    row = publish(monkeypatch, "resnet18", content)
    release.files[row.file] = content


def evaluation(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    config = compose(tmp_path, "model=resnet18", *SMALL, *QUIET, "model.num_classes=1000", name="evaluate")
    config |= {"output": str(tmp_path / "out"), **keys}
    if keys["weights"] == "official":
        config["dataset"]["class_map"] = {str(digit): digit for digit in range(10)}
    assert check(config, root=EvaluateConfig) == []
    assert evaluate(config) == 0
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return content


def test_evaluate_official_weights(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of("resnet18")
    publish_state(release, monkeypatch, state)
    torch.save(state, tmp_path / "w.pth")
    official = evaluation(tmp_path, weights="official")
    assert official["weights"] == "official"
    by_hand = evaluation(tmp_path, weights=str(tmp_path / "w.pth"))
    for key in ("loss", "acc1", "acc5", "count"):
        assert official[key] == by_hand[key], key


def test_evaluate_is_strict_about_classes(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new classifier would be a random one."""
    publish_state(release, monkeypatch, state_of("resnet18", num_classes=7))
    with pytest.raises(UserError, match=r"^the official file of resnet18 doesn't fit the model: .*number of classes$"):
        evaluation(tmp_path, weights="official")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "resnet20"}, "resnet20 has no official weights; near it, resnet"),
        ({"use_ema": True}, "the official weights of resnet18 have no averaged ones: use_ema=false"),
        ({"weights": "oficial"}, "weights=oficial: no such file; did you mean official?"),
    ],
    ids=["model without", "average", "misspelt"],
)
def test_evaluate_mistakes(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = keys.pop("model", "resnet18")
    config = compose(tmp_path, f"model={model}", *SMALL, name="evaluate") | {"weights": "official"} | keys
    with pytest.raises(UserError) as caught:
        evaluate(config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_fine_tuning(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of zero what is trained is what was loaded."""
    state = state_of("resnet18")
    publish_state(release, monkeypatch, state)
    settings = ("model=resnet18", "model.pretrained=true", *SMALL, *QUIET, "optimizer.lr=0.0")
    config = compose(tmp_path, *settings)
    assert check(config, root=TrainConfig) == []
    assert train(config) == 0
    folder = run_folder(tmp_path)
    trained, _ = read_weights(folder / "model.safetensors")
    assert trained["fc.linear.weight"].shape[0] == 10
    for name, _ in create_model("resnet18", num_classes=10).named_parameters():
        if name != "fc.linear.weight":
            assert torch.equal(trained[name], state[name]), name
    # The run's own weights are evaluated; the official ones are not fetched for that.
    release.files.clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another home"))
    assert evaluate({**compose(tmp_path, name="evaluate"), "run": str(folder), "output": str(tmp_path)}, ["run"]) == 0
    assert len(release.requests) == 1


def test_missing_weights_create_no_run_folder(release: Release, tmp_path: Path) -> None:
    config = compose(tmp_path / "runs", "model=resnet18", "model.pretrained=true", *SMALL, *QUIET)
    with pytest.raises(UserError, match=r"^model: http://127.*the server answered 404 Not Found; BCOS_WEIGHTS"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_weights_of_the_model_are_checked_as_a_config(tmp_path: Path) -> None:
    config = compose(tmp_path, "model=resnet18", "model.weights=3", "model.pretraind=true")
    assert [str(problem) for problem in check(config, root=TrainConfig)] == [
        "model.weights=3: expected text or null",
        "model.pretraind=true: unknown key; did you mean pretrained?",
    ]
