"""Distillation in a run: another teacher between stop and resume, and several processes."""

import signal
from pathlib import Path

import pytest
import torch

from bcos_train.config import UserError
from bcos_train.model import create_model
from bcos_train.run import train

from .runs import assert_same_state, compose, final_state, metric_rows, run_folder, signal_at
from .test_ddp import SELF_START, start

#: A student, and a teacher with twice its width.
SETTINGS = (
    "dataset.size=16",
    "limit_train=44",
    "limit_val=33",
    "batch_size=16",
    "num_workers=0",
    "model.inplanes=8",
    "model.max_out=1",
    "model.norm_layer=lnu-linear",
    "optimizer=sgd",
    "explanation=none",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher's run."""
    runs = tmp_path_factory.mktemp("teacher")
    changes = ("model.inplanes=16", "model.norm_layer=bnu-linear", "trainer.max_epochs=1", "limit_val=8")
    assert train(compose(runs, *SETTINGS, *changes)) == 0
    return run_folder(runs)


@pytest.mark.parametrize(
    "overrides",
    [
        ("distillation=e2kd", "distillation.teacher=timm:vit_tiny_patch16_224"),
        ("distillation=kd", "distillation.teacher=simple_vit_ti_patch16_224"),
        ("distillation=kd", "distillation.teacher=standard_vgg11_bn"),
    ],
    ids=["timm's ViT", "ViT", "VGG"],
)
def test_a_teacher_that_does_not_take_the_images(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = compose(tmp_path, *SETTINGS, "dataset.size=8", *overrides, "distillation.teacher_weights=random")
    message = rf"^{overrides[1]}: a training image of 8x8 pixels fails: "
    with pytest.raises(UserError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_teachers_accuracy_is_that_of_these_images(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the recorded one, which may be that of others."""
    overrides = ("distillation=kd", f"distillation.teacher={teacher}", "trainer.max_epochs=1", "limit_train=16")
    for limit in (33, 5):
        assert train(compose(tmp_path / str(limit), *SETTINGS, *overrides, f"limit_val={limit}")) == 0
        (row,) = (row for row in metric_rows(run_folder(tmp_path / str(limit))) if row["val/teacher_acc1"])
        accuracy = float(row["val/teacher_acc1"])
        assert f"teacher  {accuracy:.2f}% of the validation images" in capsys.readouterr().out


def test_another_teacher_between_stop_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, copy = tmp_path / "weights.pth", tmp_path / "copy.pth"
    for seed, path in ((0, weights), (1, copy)):
        torch.manual_seed(seed)
        torch.save(create_model("resnet20", num_classes=10).state_dict(), path)
    changes = ("distillation=e2kd", "distillation.teacher=resnet20", f"distillation.teacher_weights={weights}")
    config = compose(tmp_path / "runs", *SETTINGS, *changes)
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        assert train(config) == 128 + signal.SIGTERM
    run = run_folder(tmp_path / "runs")
    recorded = final_state(run)["teacher"]
    assert recorded["label"].startswith("resnet20, ")
    before, original = {path: path.read_bytes() for path in run.rglob("*.ckpt")}, weights.read_bytes()
    weights.write_bytes(copy.read_bytes())
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("distillation.teacher: the teacher changed since the last checkpoint: resnet20, ")
    assert f"instead of {recorded['label']} (SHA-256 {recorded['sha256'][:12]}…); restore it" in message
    assert message.count("SHA-256") == 2
    assert message.count(recorded["sha256"][:12]) == 1
    assert {path: path.read_bytes() for path in run.rglob("*.ckpt")} == before
    weights.write_bytes(original)
    assert train(config) == 0
    assert final_state(run)["teacher"] == recorded
    assert train(compose(tmp_path / "unstopped", *SETTINGS, *changes)) == 0
    unstopped = final_state(run_folder(tmp_path / "unstopped"))
    assert_same_state(final_state(run)["model"], unstopped["model"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "e2kd"])
def test_two_processes_equal_one(kind: str, teacher: Path, tmp_path: Path) -> None:
    """Also the metrics of the validation, 17 and 16 images of which are a process's share."""
    settings = (*SETTINGS, f"distillation={kind}", f"distillation.teacher={teacher}", "distillation.temperature=2")
    if kind == "kd":
        settings += ("distillation.ground_truth_weight=0.5",)
    assert train(compose(tmp_path / "one", *settings)) == 0
    result = start(SELF_START, *settings, f"runs={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    assert one.name == two.name
    names = {"val/agreement", "val/kl", "val/teacher_acc1"} | (
        {"val/explanation_similarity"} if kind == "e2kd" else set()
    )
    rows = list(zip(metric_rows(one), metric_rows(two), strict=True))
    assert len([row for row, _ in rows if row["val/kl"]]) == 2
    for a, b in rows:
        assert names <= a.keys() == b.keys()
        for key in a:
            assert bool(a[key]) == bool(b[key])
            if a[key] and key not in ("step", "epoch"):
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), (key, a["step"])
    for key, value in final_state(one)["model"].items():
        assert value.allclose(final_state(two)["model"][key], rtol=1e-4, atol=1e-5), key
