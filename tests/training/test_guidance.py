"""Guidance in a run, and the mistakes that are found before training starts."""

import json
from pathlib import Path

import pytest
from cifar10_files import write_cifar10

from bcos_train.config import UserError
from bcos_train.guidance import GuidanceOptions
from bcos_train.run import evaluate, train
from bcos_train.training.guidance import choose_annotated

from .runs import compose, final_state, metric_rows, run_folder
from .test_ddp import SELF_START, start


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("cifar10"))


def overrides(root: Path, *others: str) -> tuple[str, ...]:
    return (
        "dataset=pasted",
        f"dataset.root={root}",
        "dataset.size=32",
        "augmentation.train.padding=0",
        "limit_train=20",
        "limit_val=9",
        "batch_size=8",
        "num_workers=0",
        "model.max_out=1",
        "model.norm_layer=lnu-linear",
        "optimizer=sgd",
        "explanation=none",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "guidance=energy",
        *others,
    )


def test_train_without_then_with(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(compose(tmp_path / "guided", *overrides(root, "guidance.start_epoch=1"))) == 0
    line = "guidance  energy, weight 0.001 per image, bcos at input, boxes of all training images, from epoch 2\n"
    assert line in capsys.readouterr().out
    assert train(compose(tmp_path / "without", *overrides(root, "guidance=none"))) == 0
    guided, without = (metric_rows(run_folder(tmp_path / name)) for name in ("guided", "without"))
    steps = [row for row in guided if row["train/loss_step"]]
    assert len(steps) == 6
    assert [bool(row["train/loss_localization"]) for row in steps] == [False] * 3 + [True] * 3
    for row, other in zip(steps, (row for row in without if row["train/loss_step"]), strict=True):
        total = float(row["train/loss_classification"])
        if row["train/loss_localization"]:
            n_images = 4 if row is steps[-1] else 8
            total += 1e-3 * n_images * float(row["train/loss_localization"])
        else:
            assert row["train/loss_step"] == other["train/loss_step"]
        assert float(row["train/loss_step"]) == pytest.approx(total, rel=1e-5)


def test_accumulated_batches_are_one(root: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        settings = overrides(root, "guidance.weight=0.01", f"trainer.max_batch_per_device={8 // int(name)}")
        assert train(compose(tmp_path / name, *settings)) == 0
    one, two = (final_state(run_folder(tmp_path / name))["model"] for name in ("1", "2"))
    for key, value in one.items():
        assert value.allclose(two[key], rtol=1e-4, atol=1e-5), key


def test_metrics_of_boxes_in_training_and_evaluation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)  # of the evaluation's data, if set
    settings = [text for text in overrides(root, "dataset.max_objects=2") if not text.startswith("explanation")]
    metrics = ("explanation.metrics=[energy_pointing,iou]", "explanation.gallery_images=0", "trainer.max_epochs=1")
    monitor = ("checkpointing.monitor=explanation/energy_pointing",)
    assert train(compose(tmp_path, *settings, *metrics, *monitor, "trainer.progress=true")) == 0
    run = run_folder(tmp_path)
    row = metric_rows(run)[-1]
    assert f"energy pointing {float(row['explanation/energy_pointing']):6.4g}" in capsys.readouterr().out
    uniform = float(row["explanation/energy_pointing/uniform"])
    assert 0.05 < uniform < 0.4
    assert float(row["explanation/iou/uniform"]) == uniform
    assert evaluate({**compose(tmp_path, name="evaluate"), "run": str(run)}) == 0
    content = json.loads((run / "evaluation.json").read_text())
    for name in ("explanation/energy_pointing", "explanation/iou"):
        assert content[name] == pytest.approx(float(row[name]), rel=1e-4)
    scores = json.loads((run / "explanations.json").read_text())["metrics"]["iou"]
    assert scores["uniform"] == pytest.approx(uniform)
    assert scores["n_objects"] > 9


@pytest.mark.slow
@pytest.mark.parametrize("max_objects", [1, 2])
def test_two_processes(max_objects: int, root: Path, tmp_path: Path) -> None:
    """Also with several labels, one of which is drawn."""
    weights = ("guidance.weight=0.01", "guidance.annotated_fraction=0.5")
    settings = overrides(root, *weights, f"dataset.max_objects={max_objects}")
    assert train(compose(tmp_path / "one", *settings)) == 0
    result = start(SELF_START, *settings, f"runs={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    assert one.name == two.name
    for a, b in zip(metric_rows(one), metric_rows(two), strict=True):
        assert bool(a["val/loss"]) == bool(b["val/loss"])
        if a["val/loss"]:
            assert float(b["val/loss"]) == pytest.approx(float(a["val/loss"]), rel=1e-4)
    for key, value in final_state(one)["model"].items():
        assert value.allclose(final_state(two)["model"][key], rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["guidance.weight=-1"], "guidance: weight=-1.0: at least 0"),
        (["guidance.layer=layer9"], "guidance: BcosResNet has no layer 'layer9'; there are input, mid1, mid2, final"),
        (["guidance.layer=logit_layer"], r"guidance: the output of layer 'logit_layer' is \(1, 10\); a map needs"),
        (["guidance.start_epoch=2"], "guidance.start_epoch=2: the training has trainer.max_epochs=2"),
        (["augmentation.mixup_alpha=0.2"], "augmentation.mixup_alpha=0.2: pasted has boxes, which mixed images"),
        (["guidance.method=grad_cam"], "guidance.layer=input: Grad-CAM explains features; use guidance.layer=final"),
        (
            ["guidance=none", "dataset=digits", "explanation.metrics=[iou]"],
            "explanation.metrics: iou needs boxes, which",
        ),
        (["dataset=digits"], "guidance=energy: digits has no boxes"),
    ],
)
def test_mistakes(changes: list[str], message: str, root: Path, tmp_path: Path) -> None:
    settings = list(overrides(root))
    if "dataset=digits" in changes:
        settings = [text for text in settings if not text.startswith(("dataset", "augmentation", "explanation"))]
    with pytest.raises(UserError, match=message):
        train(compose(tmp_path, *settings, *changes))
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_standard_network_has_no_contributions(root: Path, tmp_path: Path) -> None:
    settings = [text for text in overrides(root) if not text.startswith("model.")]
    encoding = "encoding={_target_: bcos_train.dataset.Standardize}"
    with pytest.raises(UserError, match=r"guidance\.method=bcos: standard_resnet18 is no B-cos network; use ixg"):
        train(compose(tmp_path, *settings, "model=standard_resnet18", encoding))


def test_images_of_a_wrong_size_are_no_mistake_in_the_guidance(root: Path, tmp_path: Path) -> None:
    settings = [text for text in overrides(root) if not text.startswith("model.")]
    with pytest.raises(UserError, match=r"size=40: the training images have 40x40 pixels, which simple_vit_ti_patch16"):
        train(compose(tmp_path, *settings, "model=simple_vit_ti_patch16_224", "dataset.size=40", "optimizer=adam"))


def test_annotated_images_are_the_same_in_every_run() -> None:
    def chosen(n: int, fraction: float, seed: int = 0) -> set[int]:
        mask = choose_annotated(n, GuidanceOptions(loss="l1", annotated_fraction=fraction, annotated_seed=seed))
        assert mask is not None
        return set(mask.nonzero()[:, 0].tolist())

    assert choose_annotated(50, GuidanceOptions(loss="l1")) is None
    assert len(chosen(50, 0.1)) == 5
    assert len(chosen(50, 0.001)) == 1
    assert chosen(50, 0.1) < chosen(50, 0.5)
    assert chosen(50, 0.5) == chosen(50, 0.5)
    assert chosen(50, 0.5) != chosen(50, 0.5, seed=1)
