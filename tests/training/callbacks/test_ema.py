"""The moving average of the weights, compared with the rule of torchvision's reference and the official code."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bcos_train.runs import checkpoint as files
from bcos_train.runs.checkpoint import LAST
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.layout import read_metrics
from bcos_train.training import Checkpointing, Ema
from bcos_train.training.callbacks.checkpoint import Checkpointer
from bcos_train.training.callbacks.ema import EmaCallback, ema_decay

from ..runs import assert_same_state
from ..toys import TinyNet, fit, make_data, make_module, make_trainer

DECAY = 0.8
State = dict[str, Tensor]


class History(pl.Callback):
    """The model's state after each optimizer step, beginning with step 0."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}

    def note(self, trainer: pl.Trainer, model: Any) -> None:
        # Under accumulation several batches end at the same step; the first of them is the one that took it.
        self.states.setdefault(trainer.global_step, {key: value.clone() for key, value in model.state_dict().items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note(trainer, pl_module.model)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.note(trainer, pl_module.model)


def official_rule(history: dict[int, State], every: int, warmup_steps: int) -> State:
    """torchvision's reference: an average that is a copy as long as ``n_averaged`` is set back to 0."""
    model = TinyNet(norm="bn")

    def average(old: Tensor, new: Tensor, n: Any) -> Tensor:
        return DECAY * old + (1 - DECAY) * new

    ema = AveragedModel(model, avg_fn=average, use_buffers=True)
    for step, state in history.items():
        if step % every == 0:
            model.load_state_dict(state)
            ema.update_parameters(model)
            if step < warmup_steps:
                ema.n_averaged.fill_(0)
    return ema.module.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("every", "warmup_steps"), [(1, 0), (1, 4), (2, 0), (2, 3), (2, 4), (2, 5), (5, 0), (5, 1), (4, 99), (99, 0)]
)
def test_average_follows_the_official_rule(every: int, warmup_steps: int, accumulate: int, tmp_path: Path) -> None:
    data = make_data(accumulate=accumulate)
    torch.manual_seed(0)
    module = make_module(data, TinyNet(norm="bn"), epochs=4)
    ema, history = EmaCallback(DECAY, every, warmup_steps), History()
    fit(tmp_path, ema, history, data=data, module=module, epochs=4, accumulate=accumulate)
    assert list(history.states) == list(range(13))
    expected = official_rule(history.states, every, warmup_steps)
    ours = ema.model.state_dict()
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        if value.is_floating_point():  # buffers are averaged too
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert int(ours["norm.num_batches_tracked"]) in {
        int(s["norm.num_batches_tracked"]) for s in history.states.values()
    }
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training


@pytest.mark.parametrize(
    ("decay", "batch", "every", "epochs", "expected"),
    [
        pytest.param(0.99998, 1024, 32, 600, 1 - 2e-5 * 1024 * 32 / 600, id="the official long recipe"),
        pytest.param(0.9, 1024, 32, 600, 0.0, id="never negative"),
        pytest.param(0.0, 1, 1, 1, 0.0, id="no memory"),
    ],
)
def test_adapted_decay(decay: float, batch: int, every: int, epochs: int, expected: float) -> None:
    assert ema_decay(decay, batch, every, epochs) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "ema.decay=1.0: at least 0 and less than 1"),
        ({"decay": -0.1}, "ema.decay=-0.1"),
        ({"decay": 0.9, "every_n_steps": 0}, "ema.every_n_steps=0: at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ema(**options)


def test_saved_and_validated_beside_the_model(tmp_path: Path) -> None:
    module = fit(tmp_path, EmaCallback(DECAY, 2, 0), Checkpointer(tmp_path, Checkpointing(), StopFlag()))
    content = files.load(tmp_path / LAST)
    assert content["model"].keys() == content["model_ema"].keys() == TinyNet().state_dict().keys()
    last = read_metrics(tmp_path / "metrics.csv")[-1]
    assert last["val/loss"] != last["val_ema/loss"]
    for key, prefix in (("model", "val"), ("model_ema", "val_ema")):
        model = TinyNet()
        model.load_state_dict(content[key])
        data = make_data()
        evaluated = make_module(data, model)
        make_trainer(tmp_path / key).validate(evaluated, datamodule=data, verbose=False)
        for name in ("loss", "acc1", "acc5"):
            assert evaluated.val_result[name] == last[f"{prefix}/{name}"], (key, name)
    # Training goes on with the model's own weights.
    assert_same_state(dict(module.model.state_dict()), dict(content["model"]))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", range(1, 6))
def test_resumed_average(stop_at: int, accumulate: int, tmp_path: Path) -> None:
    stop = StopFlag()

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            stop.signum = 15 if trainer.global_step == stop_at - 1 else None

    def run(name: str, *callbacks: pl.Callback, resume_from: Path | None = None) -> dict[str, Any]:
        fit(tmp_path / name, EmaCallback(DECAY, 2, 3), *callbacks,
            Checkpointer(tmp_path / name, Checkpointing(), stop),
            data=make_data(accumulate=accumulate), accumulate=accumulate, resume_from=resume_from)  # fmt: skip
        return files.load(tmp_path / name / LAST)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("stopped", Ask())
    stop.signum = None
    assert files.load(tmp_path / "stopped" / LAST)["global_step"] == stop_at
    resumed = run("stopped", resume_from=tmp_path / "stopped" / LAST)
    for key in ("model", "model_ema"):
        assert_same_state(resumed[key], whole[key], key)
