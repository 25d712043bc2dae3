"""Schedules against the official factory's chains of PyTorch schedulers, stepped as by Lightning."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bcos.optim import LRSchedulerFactory

from bcos_train import schedule
from bcos_train.schedule import Schedule

EPOCHS, STEPS_PER_EPOCH, LR = 12, 5, 0.3

SCHEDULES: dict[str, tuple[Callable[..., Schedule], dict[str, Any]]] = {
    "cosineannealinglr": (schedule.Cosine, {"lr_min": 0.0}),
    "cosineannealinglr lr_min": (schedule.Cosine, {"lr_min": 0.01}),
    "steplr": (schedule.Step, {"step_size": 3, "gamma": 0.5}),
    "steplr long": (schedule.Step, {"step_size": 30, "gamma": 0.1}),
    "exponentiallr": (schedule.Exponential, {"gamma": 0.8}),
}
WARMUPS: dict[str, dict[str, Any]] = {
    "none": {},
    "epoch": {"warmup_epochs": 1},
    "epochs": {"warmup_epochs": 4},
    "steps": {"warmup_steps": 3},
    "many steps": {"warmup_steps": 17},
    "all epochs but one": {"warmup_epochs": EPOCHS - 1},
}
CASES = [
    pytest.param(name, interval, warmup, method, decay, id=f"{name}-{interval}-warmup {warmup}-{method}-{decay}")
    for name, interval, warmup, method, decay in itertools.product(
        SCHEDULES, ("epoch", "step"), WARMUPS, ("linear", "constant"), (0.01, 0.25)
    )
    if not (interval == "epoch" and "steps" in warmup)
    and not (interval == "step" and name == "exponentiallr")
    and not (warmup == "none" and (method, decay) != ("linear", 0.01))
]


def official_rates(factory: LRSchedulerFactory, epochs: int, steps_per_epoch: int, lr: float) -> list[float]:
    """Return the learning rate of every optimizer step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = factory.create(optimizer, epochs * steps_per_epoch)
        per_step = isinstance(made, dict)
        scheduler = made["scheduler"] if per_step else made
        rates = []
        for step in range(epochs * steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if per_step or (step + 1) % steps_per_epoch == 0:
                scheduler.step()
    return rates


def our_rates(made: Schedule, steps_per_epoch: int, lr: float) -> list[float]:
    return [made.lr(step, steps_per_epoch, lr) for step in range(made.epochs * steps_per_epoch)]


@pytest.mark.parametrize(("name", "interval", "warmup", "method", "decay"), CASES)
def test_equals_the_official_schedule(name: str, interval: str, warmup: str, method: str, decay: float) -> None:
    make, options = SCHEDULES[name]
    common: dict[str, Any] = {
        **options,
        **WARMUPS[warmup],
        "epochs": EPOCHS,
        "interval": interval,
        "warmup_method": method,
        "warmup_decay": decay,
    }
    official = official_rates(LRSchedulerFactory(name.split()[0], **common), EPOCHS, STEPS_PER_EPOCH, LR)
    ours = our_rates(make(**common), STEPS_PER_EPOCH, LR)
    # The chained schedulers multiply step by step; a cosine that has reached zero keeps their rounding error.
    assert ours == pytest.approx(official, rel=1e-9, abs=1e-15)
    assert len(set(ours)) > 1 or name == "steplr long"


@pytest.mark.parametrize(
    ("factory", "ours"),
    [
        (
            LRSchedulerFactory("cosineannealinglr", epochs=90, warmup_method="linear", warmup_epochs=5),
            schedule.Cosine(epochs=90, warmup_epochs=5),
        ),
        (LRSchedulerFactory("cosineannealinglr", epochs=100), schedule.Cosine(epochs=100)),
        (LRSchedulerFactory("steplr", step_size=30, gamma=0.1), schedule.Step(epochs=90)),
    ],
    ids=["bcos_final", "norm_ablations_final", "baseline"],
)
def test_published_runs(factory: LRSchedulerFactory, ours: Schedule) -> None:
    assert our_rates(ours, 3, 1e-3) == pytest.approx(official_rates(factory, ours.epochs, 3, 1e-3), rel=1e-9)


def test_exponential_by_step_decays_as_much_as_by_epoch() -> None:
    """The official schedule then multiplies by gamma at every step, so it vanishes within an epoch."""
    by_step = schedule.Exponential(epochs=4, gamma=0.5, interval="step")
    by_epoch = schedule.Exponential(epochs=4, gamma=0.5)
    for epoch in range(4):
        assert by_step.lr(10 * epoch, 10, LR) == pytest.approx(by_epoch.lr(10 * epoch, 10, LR), rel=1e-12)
    ratios = [by_step.lr(n + 1, 10, LR) / by_step.lr(n, 10, LR) for n in range(39)]
    assert ratios == pytest.approx([0.5**0.1] * 39, rel=1e-12)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_constant(interval: Any) -> None:
    made = schedule.Constant(epochs=6, interval=interval, warmup_epochs=2, warmup_decay=0.1)
    rates = our_rates(made, 5, LR)
    assert rates[0] == pytest.approx(0.1 * LR)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == [LR] * 20
    assert our_rates(schedule.Constant(epochs=3), 5, LR) == [LR] * 15


def test_rates_by_hand() -> None:
    cosine = schedule.Cosine(epochs=6, warmup_epochs=2, warmup_decay=0.1, lr_min=0.2)
    expected = [0.1, 0.55, 1.0, *(0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3))]
    assert our_rates(cosine, 1, 1.0) == pytest.approx(expected)
    step = schedule.Step(epochs=5, step_size=2, gamma=0.5)
    assert our_rates(step, 1, 8.0) == [8, 8, 4, 4, 2]


def test_step_decays_at_the_epoch_for_any_number_of_steps() -> None:
    """Rounding of sums of fractions such as 1/7 must not delay the decay by one step."""
    for steps_per_epoch in (3, 7, 49, 1563, 5005):
        made = schedule.Step(epochs=90, interval="step")
        for epoch in (30, 60):
            first = epoch * steps_per_epoch
            assert made.lr(first - 1, steps_per_epoch, 1.0) > 5 * made.lr(first, steps_per_epoch, 1.0)


def test_cosine_of_a_run_that_is_all_warmup() -> None:
    made = schedule.Cosine(epochs=3, warmup_epochs=3)
    assert our_rates(made, 2, LR) == sorted(our_rates(made, 2, LR))
    assert made.lr(6, 2, LR) == LR


def test_after_the_end_the_cosine_stays_at_its_minimum() -> None:
    made = schedule.Cosine(epochs=3, lr_min=0.05)
    assert [made.lr(step, 2, LR) for step in (6, 9, 40)] == [0.05] * 3


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (schedule.Cosine, {"epochs": 0}, "schedule.epochs=0: at least 1"),
        (
            schedule.Step,
            {"epochs": 3, "warmup_epochs": 1, "warmup_steps": 1, "interval": "step"},
            "schedule.warmup_epochs or schedule.warmup_steps, not both",
        ),
        (schedule.Cosine, {"epochs": 3, "warmup_epochs": -1}, "schedule.warmup_epochs=-1: at least 0"),
        (
            schedule.Cosine,
            {"epochs": 3, "warmup_steps": -1, "interval": "step"},
            "schedule.warmup_steps=-1: at least 0",
        ),
        (schedule.Cosine, {"epochs": 3, "warmup_steps": 10}, "schedule.warmup_steps requires schedule.interval=step"),
        (schedule.Exponential, {"epochs": 3, "warmup_decay": 0.0}, "schedule.warmup_decay=0.0: more than 0"),
        (schedule.Constant, {"epochs": 3, "warmup_decay": 1.5}, "schedule.warmup_decay=1.5: .*at most 1"),
        (schedule.Step, {"epochs": 3, "step_size": 0}, "schedule.step_size=0: at least 1"),
    ],
)
def test_errors(make: Callable[..., Schedule], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_quarter_of_a_cosine() -> None:
    quarter = schedule.Cosine(epochs=100, lr_min=1e-5, periods=0.25)
    rates = [quarter.lr(epoch * 7, 7, 1.01e-3) for epoch in range(100)]
    assert rates == pytest.approx([1e-3 * math.cos(math.pi * epoch / 200) + 1e-5 for epoch in range(100)])


@pytest.mark.parametrize("periods", [0.0, -0.5, 0.6])
def test_periods_out_of_range(periods: float) -> None:
    with pytest.raises(ValueError, match=r"schedule.periods=.*: more than 0, at most 0.5"):
        schedule.Cosine(epochs=3, periods=periods)
