"""Learning rate as a pure function of the optimizer step.

Nothing is accumulated from step to step, so a schedule has no state to save and a resumed run needs none. The values
equal those of torch's LinearLR/ConstantLR followed by CosineAnnealingLR/StepLR/ExponentialLR, which the official
configurations chain.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

__all__ = ["Constant", "Cosine", "Exponential", "Schedule", "Step"]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Warm-up followed by a decay, which the subclasses define.

    Args:
        epochs: Length of the run.
        interval: ``"epoch"`` holds the rate through an epoch; ``"step"`` changes it at every optimizer step.
        warmup_epochs, warmup_steps: Length of the warm-up; at most one of them. Steps need ``interval="step"``.
        warmup_method: ``"linear"`` rises from ``warmup_decay`` to 1 times the base rate, ``"constant"`` holds
            ``warmup_decay`` until the end of the warm-up.
        warmup_decay: Share of the base rate in (0, 1] with which the warm-up begins.

    Raises:
        ValueError: A length that is not positive, both lengths, or steps at epoch intervals.
    """

    epochs: int
    interval: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int | None = None
    warmup_steps: int | None = None
    warmup_method: Literal["linear", "constant"] = "linear"
    warmup_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs={self.epochs}: at least 1")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give schedule.warmup_epochs or schedule.warmup_steps, not both")
        for key in ("warmup_epochs", "warmup_steps"):
            if (length := getattr(self, key)) is not None and length < 0:
                raise ValueError(f"schedule.{key}={length}: at least 0")
        if self.warmup_steps is not None and self.interval == "epoch":
            raise ValueError("schedule.warmup_steps needs schedule.interval=step")
        if not 0 < self.warmup_decay <= 1:
            raise ValueError(f"schedule.warmup_decay={self.warmup_decay}: more than 0, at most 1")

    @abstractmethod
    def decay(self, base_lr: float, t: float, total: float) -> float:
        """Learning rate ``t`` epochs after the end of the warm-up, of ``total`` epochs that follow it."""

    def lr(self, step: int, steps_per_epoch: int, base_lr: float) -> float:
        """Learning rate of optimizer step ``step`` (counted from 0)."""
        t = float(step // steps_per_epoch) if self.interval == "epoch" else step / steps_per_epoch
        warmup = self.warmup(steps_per_epoch)
        if t < warmup:
            share = t / warmup if self.warmup_method == "linear" else 0.0
            return base_lr * (self.warmup_decay + (1 - self.warmup_decay) * share)
        return self.decay(base_lr, t - warmup, self.epochs - warmup)

    def warmup(self, steps_per_epoch: int) -> float:
        """Length of the warm-up in epochs."""
        if self.warmup_steps is not None:
            return self.warmup_steps / steps_per_epoch
        return 0.0 if self.warmup_epochs is None else float(self.warmup_epochs)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """A cosine from the base rate to ``lr_min`` over the epochs after the warm-up (arXiv 1608.03983, eq. 5).

    Args:
        lr_min: Where it ends.
        periods: Which part of a cosine's period it is, in (0, 0.5]. With half a period it ends flat, with a quarter
            of one it is steepest at the end.

    Raises:
        ValueError: As :class:`Schedule`, or ``periods`` out of range.
    """

    lr_min: float = 0.0
    periods: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.periods <= 0.5:
            raise ValueError(f"schedule.periods={self.periods}: more than 0, at most 0.5")

    def decay(self, base_lr: float, t: float, total: float) -> float:
        # A warm-up as long as the run leaves nothing to decay.
        share = min(t / total, 1.0) if total > 0 else 0.0
        end = math.cos(2 * math.pi * self.periods)
        return self.lr_min + (base_lr - self.lr_min) * (math.cos(2 * math.pi * self.periods * share) - end) / (1 - end)


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """The rate is multiplied by ``gamma`` every ``step_size`` epochs."""

    step_size: int = 30
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size < 1:
            raise ValueError(f"schedule.step_size={self.step_size}: at least 1 epoch")

    def decay(self, base_lr: float, t: float, total: float) -> float:
        # The small term: a whole number of epochs, reached by adding fractions, counts as reached.
        return base_lr * self.gamma ** math.floor(t / self.step_size + 1e-9)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """The rate is multiplied by ``gamma`` each epoch; with ``interval="step"``, by its fitting root each step."""

    gamma: float = 0.1

    def decay(self, base_lr: float, t: float, total: float) -> float:
        return base_lr * self.gamma**t


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The base rate throughout, after the warm-up if there is one."""

    def decay(self, base_lr: float, t: float, total: float) -> float:
        return base_lr
