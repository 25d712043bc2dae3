"""One step of training and validation, compared with the same step written out."""

import csv
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bcos_train.augmentation import BatchMix
from bcos_train.config import UserError
from bcos_train.dataset.data_module import DataModule
from bcos_train.loss import BinaryCrossEntropy, CrossEntropy
from bcos_train.optimizer import adaptive_clip_grad_
from bcos_train.run import train
from bcos_train.runs import checkpoint as files
from bcos_train.runs.checkpoint import LAST
from bcos_train.runs.interrupt import StopFlag
from bcos_train.runs.layout import read_metrics
from bcos_train.schedule import Cosine, Schedule, Step
from bcos_train.training import Checkpointing, Classifier, NonFiniteLoss
from bcos_train.training.callbacks.checkpoint import Checkpointer

from .runs import TINY, compose, run_folder
from .toys import RandomSource, TinyNet, fit, make_data, make_module, make_trainer

SMALL = (*TINY, "limit_train=16", "limit_val=9", "trainer.max_epochs=1")


def batches(data: DataModule, epochs: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """What training sees, as floats in [0, 1] with six channels."""
    loader = data.train_dataloader()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for images, labels, *_ in loader:
            x = images / 255
            yield torch.cat([x, 1 - x], 1), labels


# ---- a loss that isn't finite


class SometimesBad(nn.Module):
    """Binary cross-entropy, but at one call."""

    probabilities = staticmethod(torch.sigmoid)

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.calls, self.at, self.value = itertools.count(), at, value

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = BinaryCrossEntropy()(logits, target)
        return loss * self.value if next(self.calls) == self.at else loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_step_is_taken_with_a_bad_loss(value: float, accumulate: int, tmp_path: Path) -> None:
    data = make_data(accumulate=accumulate)
    module = make_module(data, loss=SometimesBad(at=4 * accumulate + accumulate - 1, value=value))
    weights: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            weights.append({key: p.detach().clone() for key, p in module.model.named_parameters()})

    saver = Checkpointer(tmp_path, Checkpointing(every_n_steps=1), StopFlag())
    with pytest.raises(NonFiniteLoss) as caught:
        fit(tmp_path, Watch(), saver, data=data, module=module, accumulate=accumulate)
    message = str(caught.value)
    assert f"({value})" in message
    batch = f"batch {2 * accumulate} of {3 * accumulate}"
    assert f"in epoch 2 of 2, {batch}, after 4 optimizer steps" in message
    for key, p in module.model.named_parameters():
        assert torch.equal(p, weights[-1][key]), key
    last = files.load(tmp_path / LAST)
    assert last["global_step"] == 4
    assert all(value.isfinite().all() for value in last["model"].values())


def test_culprits_are_named(tmp_path: Path) -> None:
    """The samples whose logits aren't finite; all of the batch if the logits are fine."""
    data = make_data()
    indices = next(iter(data.train_dataloader())).indices

    class Overflowing(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            factor = torch.ones(len(x), 1)
            factor[2] = factor[5] = math.nan
            return logits * factor

    for model, culprits in ((Overflowing(), indices[[2, 5]]), (TinyNet(), indices)):
        loss = BinaryCrossEntropy() if isinstance(model, Overflowing) else SometimesBad(0, math.nan)
        with pytest.raises(NonFiniteLoss, match=re.escape(f"samples {culprits.tolist()}.")):
            fit(tmp_path, data=make_data(), module=make_module(data, model, loss=loss))


def test_diverged_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loss = SometimesBad(at=1, value=math.nan)
    monkeypatch.setattr(BinaryCrossEntropy, "forward", lambda self, *args: loss(*args))
    monkeypatch.setattr(SometimesBad, "forward", lambda self, x, y: x.sum() * (math.nan if next(self.calls) else 1))
    assert train(compose(tmp_path, *SMALL, "checkpointing.every_n_steps=1")) == 3
    folder = run_folder(tmp_path)
    assert files.load(folder / "checkpoints" / LAST)["global_step"] == 1
    assert not (folder / "summary.json").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "stopped: the loss is not finite (nan) in epoch 1 of 1, batch 2 of 2, after 1 optimizer steps"
    )


# ---- learning rate


SCHEDULES = {
    "epochs": Cosine(epochs=3, warmup_epochs=1),
    "steps": Cosine(epochs=3, interval="step", warmup_steps=4),
    "stairs": Step(epochs=3, step_size=1, gamma=0.5),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_logged_rate_is_the_one_used(schedule: Schedule, accumulate: int, tmp_path: Path) -> None:
    used: list[float] = []

    class Sgd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            used.append(self.param_groups[0]["lr"])
            return result

    data = make_data(accumulate=accumulate)
    module = make_module(data, schedule=schedule, epochs=3, optimizer=lambda p: Sgd(p, lr=0.1))
    fit(tmp_path, data=data, module=module, epochs=3, accumulate=accumulate)
    expected = [schedule.lr(step, data.steps_per_epoch, 0.1) for step in range(9)]
    assert used == pytest.approx(expected, abs=1e-15)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["lr"] for row in rows] == pytest.approx(expected, abs=1e-15)


def test_groups_keep_their_ratio(tmp_path: Path) -> None:
    data = make_data()
    schedule = Cosine(epochs=2)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.0}], lr=0.1)

    module = make_module(data, schedule=schedule, optimizer=optimizer)
    fit(tmp_path, data=data, module=module)
    groups = module.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == pytest.approx([schedule.lr(6, 3, 0.5), 0.0])


# ---- the step, written out


@pytest.mark.parametrize("algorithm", [None, "agc", "norm", "value"])
def test_steps_equal_a_plain_loop(algorithm: str | None, tmp_path: Path) -> None:
    bound = {"agc": 0.02, "norm": 0.1, "value": 0.01}.get(algorithm or "")
    data, model = make_data(), TinyNet()
    reference = TinyNet()
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    losses, norms = [], []
    for x, labels in batches(data):
        loss = nn.functional.binary_cross_entropy_with_logits(reference(x), nn.functional.one_hot(labels, 4).float())
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for p in reference.parameters() if p.grad is not None]
        norms.append(float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()))
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        if algorithm == "agc":
            adaptive_clip_grad_(parameters, clip_factor=bound or 0)
        elif algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, bound or 0)
        elif algorithm == "value":
            nn.utils.clip_grad_value_(parameters, bound or 0)
        if algorithm is not None:
            assert any(
                not torch.equal(a, p.grad) for a, p in zip(before, parameters, strict=True) if p.grad is not None
            )
        optimizer.step()
        losses.append(loss.item())
    clipping = {} if algorithm is None else {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    module = make_module(data, model, **clipping)
    fit(tmp_path, data=make_data(), module=module)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["train/loss_step"] for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(norms, rel=1e-5), "before clipping"
    for (key, ours), theirs in zip(module.model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), key


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "agc"}])
def test_accumulation_equals_the_whole_batch(clipping: dict[str, Any], tmp_path: Path) -> None:
    """With a norm without batch statistics. The last batch of an epoch is smaller: 20 = 8 + 8 + 4."""
    weights, rows = [], []
    for accumulate in (1, 2, 4):
        data = make_data(RandomSource(n_train=20), accumulate=accumulate)
        torch.manual_seed(0)
        model = TinyNet(norm="lnu-linear")
        sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)}
        module = make_module(data, model, **sgd, **clipping)
        fit(tmp_path / str(accumulate), data=data, module=module, accumulate=accumulate)
        assert module.trainer.global_step == 6
        weights.append(model.state_dict())
        rows.append(read_metrics(tmp_path / str(accumulate) / "metrics.csv"))
    for other in weights[1:]:
        for key, value in weights[0].items():
            assert torch.allclose(value, other[key], rtol=1e-6, atol=1e-6), key
    for others in rows[1:]:
        for a, b in zip(rows[0], others, strict=True):
            for key in ("step", "lr", "train/loss_step", "gradient_norm", "train/loss", "train/acc1", "val/loss"):
                assert b.get(key) == (None if key not in a else pytest.approx(a[key], rel=1e-5)), key


def test_bf16(tmp_path: Path) -> None:
    losses = {}
    for precision in (32, "bf16"):
        data = make_data()
        module = make_module(data)
        fit(tmp_path / str(precision), data=data, module=module, precision=precision)
        assert all(p.dtype == torch.float32 for p in module.model.parameters())
        losses[precision] = [row["train/loss_step"] for row in read_metrics(tmp_path / str(precision) / "metrics.csv")]
    assert losses["bf16"] != losses[32]
    assert losses["bf16"] == pytest.approx(losses[32], rel=2e-2)


def test_half_precision_without_gpu_is_refused(tmp_path: Path) -> None:
    """Lightning would take bf16, with no more than a warning."""
    with pytest.raises(UserError, match=r"^trainer.precision=16 needs a GPU: use bf16 or 32$"):
        train(compose(tmp_path, *SMALL, "trainer.precision=16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_the_users_to_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^trainer.accelerator=gpu: "):
        train(compose(tmp_path, *SMALL, "trainer.accelerator=gpu"))


def test_channels_last(tmp_path: Path) -> None:
    rows = {}
    for setting in ("true", "false"):
        assert train(compose(tmp_path / setting, *SMALL, f"trainer.channels_last={setting}")) == 0
        folder = run_folder(tmp_path / setting)
        rows[setting] = read_metrics(folder / "metrics.csv")
    assert len(rows["true"]) == 2
    for a, b in zip(rows["true"], rows["false"], strict=True):
        assert a["train/loss_step"] == pytest.approx(b["train/loss_step"], rel=1e-5)
    # What stands in the file is in the order that every reader expects, and does not depend on the setting.
    assert run_folder(tmp_path / "true").name == run_folder(tmp_path / "false").name


def test_step_uses_channels_last_throughout() -> None:
    data = make_data()
    module = make_module(data, channels_last=True)
    images = next(iter(data.train_dataloader())).images
    assert module.encode(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(images), make_module(data)(images))


def test_frozen_parameters_are_left_alone(tmp_path: Path) -> None:
    data, model = make_data(), TinyNet()
    model.conv.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(tmp_path, data=data, module=make_module(data, model, gradient_clip_val=0.1))
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "head.linear.weight" in changed
    assert not any(key.startswith("conv.") for key in changed)


# ---- mixing


def test_mixed_labels_reach_the_loss(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Spy(BinaryCrossEntropy):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            seen.append(target)
            return super().forward(logits, target)

    data = make_data()
    module = make_module(data, loss=Spy(), mix=BatchMix(4, mixup_alpha=1.0))
    fit(tmp_path, data=data, module=module)
    assert len(seen) == 6
    for target in seen:
        assert target.shape == (8, 4)
        torch.testing.assert_close(target.sum(1), torch.ones(8))
    assert any(((target > 0) & (target < 1)).any() for target in seen)
    # Accuracy is that of the larger share.
    row = read_metrics(tmp_path / "metrics.csv")[-1]
    assert 0 <= row["train/acc1"] <= 100


def test_step_randomness_depends_on_the_step_alone(tmp_path: Path) -> None:
    """Also after something else has drawn random numbers."""

    class Dice(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            torch.rand(7)

    losses = []
    for callbacks in ([], [Dice()]):
        data = make_data()
        module = make_module(data, mix=BatchMix(4, mixup_alpha=1.0, cutmix_alpha=1.0))
        fit(tmp_path / str(len(callbacks)), *callbacks, data=data, module=module)
        rows = read_metrics(tmp_path / str(len(callbacks)) / "metrics.csv")
        losses.append([row["train/loss_step"] for row in rows])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


# ---- validation


def test_validation_counts_every_sample_once(tmp_path: Path) -> None:
    data = make_data(RandomSource(n_val=13, num_classes=7))
    model = TinyNet(7)
    module = make_module(data, model, eval_loss=CrossEntropy())
    make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    model.eval()
    losses, top1, top5 = [], 0, 0
    for image, label in data.dataset.val():  # type: ignore[attr-defined]
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            logits = model(torch.cat([x, 1 - x], 1))[0]
        losses.append(-float(logits.log_softmax(0)[label]))
        better = int((logits > logits[label]).sum())
        top1 += better < 1
        top5 += better < 5
    assert module.val_result["count"] == 13
    assert module.val_result["loss"] == pytest.approx(sum(losses) / 13, rel=1e-6)
    assert module.val_result["acc1"] == pytest.approx(100 * top1 / 13)
    assert module.val_result["acc5"] == pytest.approx(100 * top5 / 13)


def test_few_classes(tmp_path: Path) -> None:
    data = make_data(RandomSource(num_classes=3))
    fit(tmp_path, data=data, module=make_module(data))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val/acc5"]) == float(rows[-1]["train/acc5"]) == 100


def test_checkpoint_holds_the_model_under_its_name(tmp_path: Path) -> None:
    module = fit(tmp_path, Checkpointer(tmp_path, Checkpointing(), StopFlag()))
    content = files.load(tmp_path / LAST)
    assert "state_dict" not in content
    assert content["model"].keys() == TinyNet().state_dict().keys()
    for key, value in module.model.state_dict().items():
        assert torch.equal(content["model"][key], value)
    assert isinstance(module, Classifier)
