"""Teachers from names, files and folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bcos_train import create_model
from bcos_train.dataset import BcosEncoding, Standardize
from bcos_train.distillation import DistillationOptions, Teacher, load_teacher
from bcos_train.explanation import explain
from bcos_train.weights.state_dict import load_weights


def random(name: str, **options: Any) -> Teacher:
    return load_teacher(DistillationOptions(teacher=name, teacher_weights="random", **options), 5)


@pytest.fixture
def rgb() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32)


def test_random_weights(rgb: torch.Tensor) -> None:
    teacher = random("resnet20")
    assert "random weights, for trials" in teacher.label
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    x = BcosEncoding().encode(rgb)
    torch.testing.assert_close(teacher.predict(rgb), teacher.model(x))
    expected = explain(teacher.model, x)
    for kind, theirs in (("weights", expected.weights), ("contributions", expected.contribution_map)):
        logits, ours = teacher.explain(rgb, kind)
        torch.testing.assert_close(logits, expected.logits)
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad


def test_standard_networks_are_encoded_their_way(rgb: torch.Tensor) -> None:
    teacher = random("standard_resnet18")
    torch.testing.assert_close(teacher.predict(rgb), teacher.model(Standardize().encode(rgb)))
    logits, maps = teacher.explain(rgb, "grad_cam")
    assert maps.shape == (2, 32, 32)
    assert not logits.requires_grad
    assert not maps.requires_grad


def test_timm(rgb: torch.Tensor) -> None:
    pytest.importorskip("timm")
    teacher = random("timm:resnet10t")
    torch.testing.assert_close(teacher.predict(rgb), teacher.model(Standardize().encode(rgb)))


@pytest.mark.parametrize(("classes", "have"), [(21843, "21,843 classes"), (0, "no classifier")])
def test_a_classifier_that_timm_leaves_random(classes: int, have: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1000)
    model.num_classes, model.pretrained_cfg = 1000, {"num_classes": classes}  # type: ignore[assignment]
    monkeypatch.setattr("bcos_train.distillation.teacher.timm_model", lambda name, pretrained: model)
    with pytest.raises(
        ValueError, match=f"teacher=timm:vit_tiny: timm's weights have {have}; choose weights for 1,000"
    ):
        load_teacher(DistillationOptions(teacher="timm:vit_tiny"), 1000)


def test_a_weights_file(tmp_path: Path, rgb: torch.Tensor) -> None:
    model = create_model("resnet20", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = DistillationOptions(teacher="resnet20", teacher_weights=str(tmp_path / "weights.pth"))
    teacher = load_teacher(options, 5)
    twin = create_model("resnet20", num_classes=5).eval()
    load_weights(twin, model.state_dict(), "twin")
    torch.testing.assert_close(teacher.predict(rgb), twin(BcosEncoding().encode(rgb)))
    with pytest.raises(ValueError, match=r"teacher=resnet20 has 5 classes, the student 7"):
        load_teacher(options, 7)


def test_bfloat16(rgb: torch.Tensor) -> None:
    teacher, exact = random("resnet20", teacher_precision="bf16"), random("resnet20")
    exact.model.load_state_dict(teacher.model.state_dict())
    rounded, logits = teacher.predict(rgb).float(), exact.predict(rgb)
    assert not torch.equal(rounded, logits)
    torch.testing.assert_close(rounded, logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "resnet181"}, "did you mean resnet18"),
        ({"teacher": "nowhere/weights.pth"}, "no such file, folder or model"),
        ({"teacher": "resnet20", "teacher_weights": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"teacher": "resnet20", "teacher_weights": None}, "resnet20"),
        ({"teacher": ".", "teacher_weights": "random"}, "random is for a model's name; teacher=. is a file or folder"),
    ],
)
def test_missing_teachers(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(DistillationOptions(**options), 10)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"explanation_weight": -0.1},
        {"kd_weight": float("nan")},
        {"kd_weight": 0},
        {"explanation": "lime"},
        {"explanation_every_n_steps": 0},
        {"teacher_precision": "16"},
        {"teacher": ""},
    ],
)
def test_options_out_of_range(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DistillationOptions(**{"teacher": "resnet20", **options})
