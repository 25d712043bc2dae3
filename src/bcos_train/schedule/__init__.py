"""Learning rate schedules as pure functions of the optimizer step.

A schedule has no state, so there is nothing to save or to resume. Its values equal those of PyTorch's
LinearLR/ConstantLR followed by CosineAnnealingLR/StepLR/ExponentialLR, which the official configurations chain.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

__all__ = ["Constant", "Cosine", "Exponential", "Schedule", "Step"]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Warm-up followed by a decay that subclasses define.

    Args:
        epochs: Length of the run.
        interval: ``"epoch"`` updates the learning rate once per epoch, ``"step"`` at every optimizer step.
        warmup_epochs, warmup_steps: Length of the warm-up, at least 0; set at most one of them. ``warmup_steps``
            requires ``interval="step"``.
        warmup_method: ``"linear"`` increases the learning rate from ``warmup_decay`` to 1 times the base learning
            rate; ``"constant"`` multiplies it by ``warmup_decay`` until the end of the warm-up.
        warmup_decay: Factor of the base learning rate at the start of the warm-up, in (0, 1].

    Raises:
        ValueError: A value is out of range, both lengths are set, or ``warmup_steps`` with ``interval="epoch"``.
    """

    epochs: int
    interval: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int | None = None
    warmup_steps: int | None = None
    warmup_method: Literal["linear", "constant"] = "linear"
    warmup_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs={self.epochs}: at least 1 (it is trainer.max_epochs unless set)")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("set schedule.warmup_epochs or schedule.warmup_steps, not both")
        for key in ("warmup_epochs", "warmup_steps"):
            if (length := getattr(self, key)) is not None and length < 0:
                raise ValueError(f"schedule.{key}={length}: at least 0")
        if self.warmup_steps is not None and self.interval == "epoch":
            raise ValueError("schedule.warmup_steps requires schedule.interval=step")
        if not 0 < self.warmup_decay <= 1:
            raise ValueError(f"schedule.warmup_decay={self.warmup_decay}: more than 0, at most 1")

    @abstractmethod
    def decay(self, base_lr: float, t: float, total: float) -> float:
        """Return the learning rate ``t`` epochs after the warm-up, with ``total`` epochs of decay."""

    def lr(self, step: int, steps_per_epoch: int, base_lr: float) -> float:
        """Return the learning rate of optimizer step ``step`` (counted from 0)."""
        t = float(step // steps_per_epoch) if self.interval == "epoch" else step / steps_per_epoch
        warmup = self.warmup(steps_per_epoch)
        if t < warmup:
            progress = t / warmup if self.warmup_method == "linear" else 0.0
            return base_lr * (self.warmup_decay + (1 - self.warmup_decay) * progress)
        return self.decay(base_lr, t - warmup, self.epochs - warmup)

    def warmup(self, steps_per_epoch: int) -> float:
        """Return the length of the warm-up in epochs."""
        if self.warmup_steps is not None:
            return self.warmup_steps / steps_per_epoch
        return 0.0 if self.warmup_epochs is None else float(self.warmup_epochs)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Cosine decay from the base learning rate to ``lr_min`` after the warm-up (arXiv 1608.03983, eq. 5).

    Args:
        lr_min: Final learning rate.
        periods: Fraction of a cosine period, in (0, 0.5]. With half a period the decay ends flat, with a quarter it is
            steepest at the end.

    Raises:
        ValueError: As for :class:`Schedule`, or ``periods`` is out of range.
    """

    lr_min: float = 0.0
    periods: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.periods <= 0.5:
            raise ValueError(f"schedule.periods={self.periods}: more than 0, at most 0.5")

    def decay(self, base_lr: float, t: float, total: float) -> float:
        # A warm-up of the length of the run leaves no epochs to decay.
        progress = min(t / total, 1.0) if total > 0 else 0.0
        end = math.cos(2 * math.pi * self.periods)
        cosine = math.cos(2 * math.pi * self.periods * progress)
        return self.lr_min + (base_lr - self.lr_min) * (cosine - end) / (1 - end)


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Multiply the learning rate by ``gamma`` every ``step_size`` epochs.

    Raises:
        ValueError: As for :class:`Schedule`, or ``step_size`` is below 1.
    """

    step_size: int = 30
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size < 1:
            raise ValueError(f"schedule.step_size={self.step_size}: at least 1 epoch")

    def decay(self, base_lr: float, t: float, total: float) -> float:
        # Without the small term, a sum of fractions could end just below a whole number of epochs.
        return base_lr * self.gamma ** math.floor(t / self.step_size + 1e-9)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Multiply the learning rate by ``gamma`` per epoch, with ``interval="step"`` by its root at each step."""

    gamma: float = 0.1

    def decay(self, base_lr: float, t: float, total: float) -> float:
        return base_lr * self.gamma**t


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Constant base learning rate after the warm-up."""

    def decay(self, base_lr: float, t: float, total: float) -> float:
        return base_lr
