"""A trained network's outputs don't change on loading, or a warning says what is assumed."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bcos_train import create_model, load
from bcos_train.weights.export import export

SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1)}
BIAS = -math.log(999)
MESSAGE = (
    r"w\.pth doesn't record its logit bias: -2\.1972 is assumed, the default for 10 classes; if its classifier was "
    r"replaced after training on 1000 classes, set logit_bias=-6\.9068, or its probabilities change$"
)


@pytest.fixture
def fine_tuned(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """What replacing the classifier of an official network gives: it keeps the logit bias of 1000 classes."""
    model = create_model("resnet18", num_classes=10, logit_bias=BIAS, **SMALL).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth", model


def test_the_assumed_bias_is_told(fine_tuned: tuple[Path, torch.nn.Module]) -> None:
    path, model = fine_tuned
    x = torch.rand(2, 6, 32, 32)
    with pytest.warns(UserWarning, match=MESSAGE):
        other = create_model("resnet18", weights=path, num_classes=10, **SMALL).eval()
    with pytest.warns(UserWarning, match=MESSAGE):
        load(path, model="resnet18", options=SMALL)
    with pytest.warns(UserWarning, match=MESSAGE):
        export(str(path), path.with_name("out"), model="resnet18", options=SMALL)
    assert (other(x) - model(x)).mean().item() == pytest.approx(4.71, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = create_model("resnet18", weights=path, num_classes=10, logit_bias=BIAS, **SMALL).eval()
    assert torch.equal(same(x), model(x))


def test_no_warning_where_the_bias_is_known(fine_tuned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    """Another classifier than the file's, the number of classes of the official weights, models without such."""
    path, _ = fine_tuned
    torch.save(create_model("resnet20", num_classes=7).state_dict(), tmp_path / "cifar.pth")
    torch.save(create_model("resnet18", **SMALL).state_dict(), tmp_path / "imagenet.pth")
    torch.save(create_model("standard_resnet18", num_classes=7).state_dict(), tmp_path / "standard.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model("resnet18", weights=path, num_classes=5, **SMALL)
        create_model("resnet18", weights=tmp_path / "imagenet.pth", **SMALL)
        create_model("resnet20", weights=tmp_path / "cifar.pth", num_classes=7)
        create_model("standard_resnet18", weights=tmp_path / "standard.pth", num_classes=7)
