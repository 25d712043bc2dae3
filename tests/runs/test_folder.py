"""Run folder: name, resume state and lock."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from training.runs import TINY, compose, run_folder, signal_at

from bcos_train.config import UserError
from bcos_train.config.signature import keyword_parameters
from bcos_train.config.targets import TARGETS, resolve
from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.folder import find_checkpoint, read_run_folder
from bcos_train.runs.hash import PATHS, run_hash, with_absolute_paths
from bcos_train.runs.layout import LAST
from bcos_train.runs.lock import locked
from bcos_train.utils.atomic import remove_leftovers, unused_path
from bcos_train.weights.files import save_weights

SMALL = (*TINY, "limit_train=16", "limit_val=9", "trainer.max_epochs=1")


# ---- the run's name


@pytest.fixture(scope="module")
def base_hash() -> str:
    return run_hash(compose(Path("runs"), *TINY))


NOT_HASHED = (
    "num_workers=3",
    "trainer.devices=2",
    "trainer.num_nodes=2",
    "trainer.accelerator=gpu",
    "trainer.max_batch_per_device=4",
    "trainer.channels_last=true",
    "trainer.progress=true",
    "trainer.log_every_n_steps=7",
    "logger=wandb",
    "logger=[wandb,tensorboard]",
    "explanation=default",
    "checkpointing.keep_best=5",
    "name=other",
    "resume=false",
    "dataset.split_seed=1",  # nothing is drawn
)
HASHED = (
    "optimizer.lr=0.01",
    "optimizer=sgd",
    "seed=1",
    "model=resnet32",
    "model.b=1.5",
    "augmentation=crop_flip",
    "augmentation.mixup_alpha=0.5",
    "augmentation.train.degrees=5.0",
    "batch_size=16",
    "dataset.shots=5",
    "dataset.val_per_class=5",
    "drop_last=true",
    "trainer.max_epochs=3",
    "trainer.precision=bf16",
    "trainer.gradient_clip_val=0.1",
    "trainer.sync_batchnorm=true",
    "schedule=step",
    "loss=cross_entropy",
    "limit_train=8",
    "limit_val=8",
    "ema=null",
    "dataset.val_fraction=0.3",
    "encoding._target_=bcos_train.dataset.Standardize",
)


@pytest.mark.parametrize("override", NOT_HASHED)
def test_hash_ignores_what_changes_no_result(override: str, base_hash: str) -> None:
    assert run_hash(compose(Path("elsewhere"), *TINY, override)) == base_hash


def test_hash_depends_on_what_changes_results(base_hash: str) -> None:
    hashes = {override: run_hash(compose(Path("runs"), *TINY, override)) for override in HASHED}
    assert len({*hashes.values(), base_hash}) == len(HASHED) + 1, hashes


def test_keys_of_later_versions_do_not_change_the_hash(base_hash: str) -> None:
    config = compose(Path("runs"), *TINY)
    for key in ("shots", "val_per_class", "split_seed"):
        del config["dataset"][key]
    for key in ("drop_last", "distillation", "guidance"):
        del config[key]
    assert run_hash(config) == base_hash
    drawn = [compose(Path("runs"), *TINY, "dataset.shots=5", f"dataset.split_seed={seed}") for seed in (1, 2)]
    assert run_hash(drawn[0]) != run_hash(drawn[1])


@pytest.mark.parametrize(("dataset", "counts"), [("imagefolder", True), ("cifar10", False), ("imagenet", False)])
def test_root_is_hashed_where_it_defines_the_data(dataset: str, counts: bool, tmp_path: Path) -> None:
    def named(root: str) -> str:
        return run_hash(compose(tmp_path, f"dataset={dataset}", f"dataset.root={root}"))

    assert (named("/a") != named("/b")) == counts
    # The same folder, written otherwise.
    assert named("/a") == named("/a/") == named("/b/../a")
    assert named("x") == named(f"{os.getcwd()}/x")
    assert named('"~/x"') == named(os.path.expanduser("~/x"))


def test_relative_weights_are_hashed_and_kept_as_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(weights: str) -> str:
        return run_hash(compose(tmp_path, f"model.weights={weights}"))

    monkeypatch.chdir(tmp_path)
    here = named("w.pth")
    assert here == named(f"{tmp_path}/w.pth") == named(f"{tmp_path}/../{tmp_path.name}/w.pth")
    config = compose(tmp_path, "model.weights=w.pth", "dataset=imagefolder", "dataset.root=data")
    absolute = with_absolute_paths(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert named("w.pth") != here == named("../w.pth")
    assert (absolute["model"]["weights"], absolute["dataset"]["root"]) == (f"{tmp_path}/w.pth", f"{tmp_path}/data")
    assert with_absolute_paths(absolute) == absolute
    official = compose(tmp_path, "model.weights=official")
    assert with_absolute_paths(official) == official


def test_every_path_of_the_config_is_known() -> None:
    """Parameters of targets that are annotated as paths."""
    known = {path.rpartition(".")[2] for path in PATHS}
    for name in TARGETS:
        target = resolve(name)
        nodes: dict[str, Any] = {"name": "resnet20"} if name.endswith("create_model") else {}
        for key, parameter in keyword_parameters(target, nodes).items():
            # The run passes its folder to loggers.
            is_path = "Path" in str(parameter.annotation) and key != "folder"
            assert not is_path or key in known, f"{name}: {key}"


def test_hash_does_not_change_the_config(tmp_path: Path) -> None:
    config = compose(tmp_path, "dataset=imagefolder", "dataset.root=x")
    before = json.dumps(config)
    run_hash(config)
    assert json.dumps(config) == before


# ---- the run folder


def test_new_folders_are_numbered(tmp_path: Path) -> None:
    base = tmp_path / "name-1234"
    assert unused_path(base) == base
    base.mkdir()
    assert unused_path(base) == tmp_path / "name-1234-2"
    (tmp_path / "name-1234-2").mkdir()
    assert unused_path(base) == tmp_path / "name-1234-3"
    folder = read_run_folder(tmp_path / "name-1234-3")
    assert (folder.resume_from, folder.finished, folder.warnings) == (None, False, ())


def test_resume_state(tmp_path: Path) -> None:
    files.save({"n": 1}, tmp_path / "checkpoints" / LAST)
    files.save({"n": 2}, tmp_path / "checkpoints" / LAST)
    folder = read_run_folder(tmp_path)
    assert folder.resume_from == folder.checkpoints / LAST
    assert not folder.finished
    (tmp_path / "checkpoints" / LAST).write_bytes(b"")
    (tmp_path / "summary.json").write_text('{"steps": 2}')
    save_weights(nn.Linear(1, 1), tmp_path / "model.safetensors")
    folder = read_run_folder(tmp_path)
    assert folder.resume_from == folder.checkpoints / files.PREVIOUS
    assert folder.finished
    assert len(folder.warnings) == 1


@pytest.fixture
def unverified(tmp_path: Path) -> Path:
    """A run folder whose checkpoints were copied without their checksums."""
    for n in (1, 2):
        files.save({"n": n}, tmp_path / "checkpoints" / LAST)
    for path in (tmp_path / "checkpoints").glob("*.sha256"):
        path.unlink()
    return tmp_path


def test_a_run_without_a_valid_checkpoint_does_not_start_again(unverified: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no valid checkpoint among 2 in .*last\.ckpt has no .*resume=adopt"
    ) as caught:
        read_run_folder(unverified)
    assert "\n" not in str(caught.value)


def test_the_newest_checkpoint_without_a_checksum_is_adopted(unverified: Path) -> None:
    folder = read_run_folder(unverified, adopt=True)
    assert folder.resume_from == unverified / "checkpoints" / LAST
    assert files.load(folder.resume_from) == {"n": 2}
    assert read_run_folder(unverified).resume_from == folder.resume_from


def test_only_files_that_can_be_read_are_adopted(unverified: Path) -> None:
    (unverified / "checkpoints" / LAST).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"can't adopt .*last\.ckpt: it can't be read"):
        read_run_folder(unverified, adopt=True)


def test_a_file_that_differs_from_its_checksum_is_not_adopted(tmp_path: Path) -> None:
    files.save({"n": 1}, tmp_path / "checkpoints" / LAST)
    (tmp_path / "checkpoints" / LAST).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"no checkpoint to adopt in .*is damaged"):
        read_run_folder(tmp_path, adopt=True)


def test_saving_sets_a_checkpoint_aside_that_was_not_verified(unverified: Path) -> None:
    folder = unverified / "checkpoints"
    good = (folder / LAST).read_bytes()
    for n in (3, 4):
        files.save({"n": n}, folder / LAST)
    assert (folder / f"{LAST}.unverified-1").read_bytes() == good
    assert [files.load(folder / name)["n"] for name in (LAST, files.PREVIOUS)] == [4, 3]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    mine, theirs = tmp_path / f".metrics.csv.{os.getpid()}.tmp", tmp_path / "checkpoints" / f".last.ckpt.{child}.tmp"
    for path in (mine, theirs, tmp_path / "notes.tmp"):
        path.touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == [mine.name, "notes.tmp"]


@pytest.mark.parametrize(
    "name", ["../../evil.ckpt", "/etc/passwd", "epoch-0001-x.ckpt/../../y.ckpt", "last.ckpt", 7, None]
)
def test_names_in_the_list_of_best_checkpoints_are_not_paths(name: object, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(json.dumps([{"file": name, "score": 1.0, "epoch": 1}]))
    with pytest.raises(ValueError, match="not the name of a checkpoint of this run"):
        find_checkpoint(tmp_path, "best")


@pytest.mark.parametrize("text", ["[" * 100_000, "{}x", "[[]]", '"x"', "{}{"])
def test_a_damaged_list_of_best_checkpoints(text: str, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(ValueError, match=r"best\.json is damaged .*; use checkpoint=last"):
        find_checkpoint(tmp_path, "best")


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    target, run = tmp_path / "thesis.txt", tmp_path / "run"
    run.mkdir()
    for name, content in ((target, "years of work"), (tmp_path / "absent", None)):
        if content is not None:
            name.write_text(content)
        (run / ".lock").unlink(missing_ok=True)
        (run / ".lock").symlink_to(name)
        with pytest.raises(ValueError, match="can't write to .*run: Too many levels of symbolic links"), locked(run):
            pass
        assert (name.read_text() if name.exists() else None) == content


def test_a_child_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Loader workers outlive a killed run for some seconds."""
    started = tmp_path / "started"
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            started.touch()
            time.sleep(60)
            os._exit(0)
    while not started.exists():
        time.sleep(0.01)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that holds the lock of a folder."""
    folder, ready = tmp_path / "run", tmp_path / "ready"
    pid = os.fork()
    if pid == 0:
        with locked(folder):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    yield pid, folder
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_process_is_refused(other_process: tuple[int, Path]) -> None:
    _, folder = other_process
    with pytest.raises(
        ValueError, match=r"another process is training in .*: wait, stop it, or set another name="
    ) as caught:
        locked(folder).__enter__()
    assert "\n" not in str(caught.value)


def test_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        locked(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path), pytest.raises(ValueError, match="another process"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


def test_second_run_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(tmp_path, *SMALL)
    signal_at(monkeypatch, 0)
    assert train(config) == 143
    folder = run_folder(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with locked(folder), pytest.raises(UserError, match="another process is training in"):
        train(config)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't write to .*file/digits.*: Not a directory"):
        train(compose(tmp_path / "file", *SMALL))
