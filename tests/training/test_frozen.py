"""Runs with a frozen teacher: equal to those with the teacher, resumable, and on nothing but their own images."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from bcos_train import create_model
from bcos_train.config import UserError
from bcos_train.dataset import TrainBatchSampler, to_float
from bcos_train.distillation import crop_maps
from bcos_train.distillation import store as store_module
from bcos_train.distillation.store import Store
from bcos_train.run import precompute_teacher, train
from bcos_train.training import precompute

from .runs import assert_same_state, compose, final_state, metric_rows, run_folder, signal_at
from .toys import RandomSource, make_data

SMALL = (
    "dataset.size=16",
    "limit_train=24",
    "limit_val=9",
    "batch_size=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "num_workers=0",
    "explanation=none",
    "augmentation=plain",
)
CROPS = ("augmentation=crop_flip", "augmentation.train.size=16", "augmentation.train.padding=2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.save(create_model("resnet20", num_classes=10).state_dict(), path)
    return path


def compute(weights: Path, out: Path, *overrides: str) -> None:
    teacher = ("distillation.teacher=resnet20", f"distillation.teacher_weights={weights}")
    config = compose(out.parent, *SMALL, *teacher, *overrides, name="precompute_teacher")
    assert precompute_teacher({**config, "out": str(out)}) == 0


@pytest.fixture(scope="module")
def maps(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of full resolution and precision, in several shards."""
    out = tmp_path_factory.mktemp("frozen") / "maps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_IMAGES", 10)
        compute(weights, out, "dtype=float32")
    return out


def frozen(runs: Path, maps: Path, *overrides: str) -> dict[str, Any]:
    return compose(runs, *SMALL, "distillation=e2kd_frozen", f"distillation.frozen={maps}", *overrides)


def test_the_teachers_accuracy_is_that_of_the_validation_images(
    maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in (9, 4):
        overrides = ("trainer.max_epochs=1", f"limit_val={limit}")
        assert train(frozen(tmp_path / str(limit), maps, *overrides)) == 0
        (row,) = (row for row in metric_rows(run_folder(tmp_path / str(limit))) if row["val/teacher_acc1"])
        assert f"teacher  {float(row['val/teacher_acc1']):.2f}% of the validation images" in capsys.readouterr().out


def test_the_losses_are_those_of_the_teacher(weights: Path, maps: Path, tmp_path: Path) -> None:
    assert train(frozen(tmp_path / "frozen", maps)) == 0
    teacher = ("distillation.teacher=resnet20", f"distillation.teacher_weights={weights}")
    assert train(compose(tmp_path / "live", *SMALL, "distillation=e2kd", *teacher)) == 0
    ours, theirs = (metric_rows(run_folder(tmp_path / name)) for name in ("frozen", "live"))
    assert len(ours) == len(theirs)
    compared = set()
    for a, b in zip(ours, theirs, strict=True):
        assert {key for key in a if a[key]} == {key for key in b if b[key]}
        for key in filter(a.get, a):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-5), key
            compared.add(key)
    # The first step: before rounding errors have grown.
    first = [next(row["train/loss_step"] for row in rows if row.get("train/loss_step")) for rows in (ours, theirs)]
    assert float(first[0]) == pytest.approx(float(first[1]), rel=1e-6)
    terms = {"train/loss_kd", "train/loss_explanation", "train/agreement"}
    assert terms | {"val/agreement", "val/kl", "val/teacher_acc1", "val/explanation_similarity"} <= compared


def test_half_size_and_precision(weights: Path, maps: Path, tmp_path: Path) -> None:
    compute(weights, tmp_path / "small", "size=8")
    store, exact = Store.open(tmp_path / "small"), Store.open(maps)
    assert store.manifest.parts["train"].map_shape == (6, 8, 8)
    record, reference = store.read("train", 3), exact.read("train", 3)
    assert record["map"].dtype == np.float16
    assert np.array_equal(record["logits"], reference["logits"])
    small, full = (torch.tensor(each["map"]).float().flatten() for each in (record, reference))
    pooled = torch.nn.functional.avg_pool2d(full.view(6, 16, 16), 2).flatten()
    assert torch.cosine_similarity(small, pooled, dim=0) > 0.9
    assert train(frozen(tmp_path / "runs", tmp_path / "small", *CROPS, "trainer.max_epochs=1")) == 0


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (4, 2)])
def test_stop_and_resume(batch: int, workers: int, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(frozen(tmp_path / "whole", maps, *CROPS)) == 0
    config = frozen(tmp_path / "stopped", maps, *CROPS, f"num_workers={workers}")
    with monkeypatch.context() as patch:
        signal_at(patch, batch)
        assert train(config) == 128 + signal.SIGTERM
    assert train({**config, "num_workers": 2 - workers}) == 0
    whole, stopped = run_folder(tmp_path / "whole"), run_folder(tmp_path / "stopped")
    for key in ("model", "optimizer_states", "global_step"):
        assert_same_state(final_state(whole)[key], final_state(stopped)[key], key)
    assert metric_rows(whole) == metric_rows(stopped)


def test_other_maps_between_stop_and_resume(
    weights: Path, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(maps, copy := tmp_path / "maps")
    config = frozen(tmp_path / "runs", copy, *CROPS)
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        assert train(config) == 128 + signal.SIGTERM
    shutil.rmtree(copy)
    compute(weights, copy, "size=8")
    with pytest.raises(
        UserError, match=r"^distillation.teacher: the teacher changed since the last checkpoint"
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_no_teacher_is_loaded(maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("frozen", "distillation"):
        monkeypatch.setattr(f"bcos_train.training.{module}.load_teacher", lambda *_: 1 / 0)
    assert train(frozen(tmp_path, maps, "trainer.max_epochs=1", "distillation.explanation_weight=0")) == 0


def test_image_and_map_stay_together() -> None:
    """A map that equals its image still does after crop and flip."""
    data = make_data(RandomSource(n_train=24))
    images = data.images("train")
    pixels = [v2.functional.pil_to_tensor(images[n][0]) for n in range(24)]
    data.train_lookup = lambda index: {"teacher_maps": pixels[index].float() / 255}
    data.train_transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=2), v2.PILToTensor()])
    flipped = 0
    for batch in data.train_dataloader():
        assert batch.extras is not None
        crops = crop_maps(batch.extras["teacher_maps"], batch.extras["window"], 8, 8)
        assert torch.equal(crops, to_float(batch.images))
        flipped += int((batch.extras["window"][:, 0] > batch.extras["window"][:, 2]).sum())
    assert 4 < flipped < 20


def test_subsets_find_their_maps(maps: Path, weights: Path, tmp_path: Path) -> None:
    """With fewer images than the maps are of; and not with others."""
    assert train(frozen(tmp_path / "runs", maps, "limit_train=16", "limit_val=8", "trainer.max_epochs=1")) == 0
    with pytest.raises(UserError, match=r"maps of 24 training images, without 8 of the 32 .*the same limit_train"):
        train(frozen(tmp_path / "runs", maps, "limit_train=32"))


def test_few_shots_find_their_maps(weights: Path, tmp_path: Path) -> None:
    every = ("limit_train=null", "dataset.val_per_class=1", "limit_val=null")
    compute(weights, tmp_path / "maps", *every, "dataset.shots=2")
    whole = Store.open(tmp_path / "maps")
    assert whole.manifest.parts["train"].inventory["count"] == 1438
    assert (len(whole.indices["train"]), len(whole.indices["val"])) == (20, 10)
    assert train(frozen(tmp_path / "runs", tmp_path / "maps", *every, "dataset.shots=1", "trainer.max_epochs=1")) == 0
    with pytest.raises(UserError, match=r"maps of 20 training images, without 10 of the 30"):
        train(frozen(tmp_path / "runs", tmp_path / "maps", *every, "dataset.shots=3"))
    with pytest.raises(UserError, match=r"maps of a data set with 1,438 validation images; there are 359"):
        train(frozen(tmp_path / "runs", tmp_path / "maps", *every, "dataset.val_per_class=null"))


def test_the_gallery_shows_the_maps(maps: Path, tmp_path: Path) -> None:
    config = frozen(tmp_path, maps, "explanation=default", "explanation.metrics=[]", "trainer.max_epochs=1")
    assert train(config) == 0
    assert [path.name for path in (run_folder(tmp_path) / "explanations").glob("epoch*")] == ["epoch-0001.png"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("augmentation.mixup_alpha=0.2",), "augmentation.mixup_alpha=0.2: frozen maps are those of single images"),
        (("augmentation.cutmix_alpha=1.0",), "augmentation.cutmix_alpha=1.0: frozen maps"),
        (("augmentation=digits",), "augmentation.train: after RandomAffine a map"),
        (("augmentation=imagenet_ra", "augmentation.mixup_alpha=0"), "augmentation.train: after RandAugment a map"),
        (
            ("augmentation=imagenet", "augmentation.train.random_erase_prob=0.1"),
            "augmentation.train: after RandomErasing a map",
        ),
        (("dataset.cache=device",), "dataset.cache=device: cached images come without frozen maps"),
        (("dataset.size=20",), "other training images: image .* 20×20 pixels .* it had label ., 16×16"),
        (("dataset.val_fraction=0.3",), "maps of a data set with 1,438 training images; there are"),
        (("augmentation.eval.size=18",), r"maps of another view of the training images, Compose\( PILToTensor"),
        (("distillation.explanation=contributions",), "explanation=contributions: the stored maps are weights"),
        (("distillation.teacher_precision=bf16",), "teacher_precision=bf16 has no effect without teacher"),
        (("model=standard_resnet18", "encoding._target_=bcos_train.dataset.Standardize"), "the stored maps are W"),
        (("distillation.teacher=resnet20", "distillation.teacher_weights=random"), "teacher=resnet20: the maps in"),
        (("model.num_classes=12",), "the teacher has 10 classes, the student 12"),
        (("distillation.frozen=nowhere",), "distillation.frozen: .*nowhere: no such folder"),
    ],
)
def test_refusals(overrides: tuple[str, ...], message: str, maps: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(frozen(tmp_path, maps, *overrides))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "cifar10"}, "maps of dataset=cifar10, not of digits"),
        ({"class_names": list("0123456798")}, "class 8 is '8' in the data set, '9' in the model"),
        ({"version": 0}, "version 0"),
    ],
)
def test_other_stores(change: dict[str, Any], message: str, maps: Path, tmp_path: Path) -> None:
    shutil.copytree(maps, copy := tmp_path / "maps")
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        train(frozen(tmp_path / "runs", copy))


def test_a_missing_shard(maps: Path, tmp_path: Path) -> None:
    shutil.copytree(maps, copy := tmp_path / "maps")
    (copy / "train-00002.npy").unlink()
    with pytest.raises(UserError, match=r"^distillation.frozen: .*1 of 4 shards are missing"):
        train(frozen(tmp_path / "runs", copy))


@pytest.mark.parametrize("workers", [0, 1])
def test_maps_that_disappear_in_training(
    workers: int, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(maps, copy := tmp_path / "maps")
    start_epoch = TrainBatchSampler.__iter__

    def iterate(sampler: TrainBatchSampler) -> Any:
        for path in copy.glob("train-0*.npy"):
            path.unlink()
        return start_epoch(sampler)

    monkeypatch.setattr(TrainBatchSampler, "__iter__", iterate)
    with pytest.raises(UserError, match=r"^can't read .*maps/train-0000\d.npy: .*No such file") as caught:
        train(frozen(tmp_path / "runs", copy, f"num_workers={workers}"))
    assert "\n" not in str(caught.value)


def test_computing_says_if_the_training_cannot_use_the_maps(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute(weights, tmp_path / "maps", "augmentation=digits")
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: this training can't use the maps: augmentation.train: after RandomAffine" in printed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_killed_computation_continues(
    weights: Path, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_module, "SHARD_IMAGES", 10)
    out = tmp_path / "maps"
    if (child := os.fork()) == 0:
        try:
            written = Store.write

            def write(store: Store, part: Any, number: int, records: np.ndarray) -> None:
                if number == 2:  # leaves a part of a file
                    (store.folder / f".train-00002.npy.{os.getpid()}.tmp").write_bytes(b"x")
                    os.kill(os.getpid(), signal.SIGKILL)
                written(store, part, number, records)

            Store.write = write  # type: ignore[method-assign]
            compute(weights, out, "dtype=float32")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(contents(out)) == [
        *("manifest.json", "train-00000.npy", "train-00001.npy", "train-indices.npy", "val-indices.npy"),
    ]
    with pytest.raises(UserError, match="2 of 4 shards are missing"):
        train(frozen(tmp_path / "runs", out))
    before = (out / "train-00000.npy").stat().st_mtime_ns
    capsys.readouterr()
    compute(weights, out, "dtype=float32")
    assert "missing are 2 with" in capsys.readouterr().out
    assert (out / "train-00000.npy").stat().st_mtime_ns == before
    assert contents(out) == contents(maps)
    assert not list(out.glob(".*.tmp"))


def test_verify_repairs(weights: Path, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(maps, copy := tmp_path / "maps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_IMAGES", 10)
        path = copy / "train-00001.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        compute(weights, copy, "dtype=float32", "verify=true")
    output = capsys.readouterr().out
    assert "train-00001.npy, will be computed again" in output
    assert "verified: 3 shards are intact" in output
    assert contents(copy) == contents(maps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dtype=float16",), "maps with another dtype, 'float32' instead of 'float16': choose another one"),
        (("dtype=float32", "size=8"), "another parts.train.map_shape"),
        (("dtype=float32", "limit_train=25"), "another parts.train.count, 24 instead of 25"),
        (("dtype=float32", "dataset.size=18"), "another parts.train.samples"),
        (("dtype=float32", "distillation.teacher_weights=random"), "another teacher"),
        (("dtype=float64",), "dtype=float64: float16 or float32"),
        (("size=0",), "size=0: at least 1 pixel"),
        (("distillation=none",), "distillation.teacher: name the teacher"),
        (("distillation.explanation=grad_cam", "distillation.teacher=resnet18"), "distillation"),
    ],
)
def test_other_contents_of_the_folder(
    overrides: tuple[str, ...], message: str, weights: Path, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD_IMAGES", 10)
    before = contents(maps)
    if "distillation=none" in overrides:
        config = compose(maps.parent, *SMALL, *overrides, name="precompute_teacher")
        with pytest.raises(UserError, match=message):
            precompute_teacher({**config, "out": str(maps)})
    else:
        with pytest.raises(UserError, match=message):
            compute(weights, maps, *overrides)
    assert contents(maps) == before


def test_it_has_to_fit_on_the_disk(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"MB are needed, 0.00 MB are free: .*a smaller size"):
        compute(weights, tmp_path / "maps")
    assert contents(tmp_path / "maps") == {}


def test_a_teacher_without_explanations(tmp_path: Path) -> None:
    """Contributions of a standard teacher have one channel."""
    teacher = ("distillation.teacher=standard_resnet18", "distillation.teacher_weights=random")
    config = compose(tmp_path, *SMALL, *teacher, "limit_train=8", "limit_val=4", name="precompute_teacher")
    assert precompute_teacher({**config, "out": str(tmp_path / "maps")}) == 0
    store = Store.open(tmp_path / "maps")
    assert store.manifest.explanation == "contributions"
    assert store.manifest.parts["val"].map_shape == (1, 16, 16)
    assert train(frozen(tmp_path / "runs", tmp_path / "maps", "limit_train=8", "limit_val=4")) == 0
