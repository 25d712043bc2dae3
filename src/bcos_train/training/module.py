"""The LightningModule: training and validation steps of any classifier."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.utilities.distributed import gather_all_tensors

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.encoding import BcosEncoding, Standardize, to_float
from bcos_train.dataset.randomness import step_seed
from bcos_train.explanation import without_tf32
from bcos_train.nn import cached_weights
from bcos_train.optimizer import adaptive_clip_grad_
from bcos_train.runs.checkpoint import Checkpoint
from bcos_train.schedule import Schedule
from bcos_train.task import Network, Task, TrainingBatch
from bcos_train.training.compilation import CompiledNetwork
from bcos_train.training.distributed import (
    broadcast_buffers,
    is_distributed,
    max_over_processes,
    mean_and_votes,
    sum_over_processes,
)
from bcos_train.training.resuming import move_to_position
from bcos_train.training.score import ClassificationScore, MultiLabelScore


class NonFiniteLoss(RuntimeError):
    """The loss, or a weight to be saved, is NaN or infinite; raised in all processes together.

    For a loss, it is raised before the optimizer step.

    Args:
        is_elsewhere: Those of this process are finite.
    """

    exit_code = 3

    def __init__(self, message: str, is_elsewhere: bool = False) -> None:
        super().__init__(message)
        self.is_elsewhere = is_elsewhere


class Classifier(pl.LightningModule):
    """Train and validate ``model`` on uint8 RGB batches.

    Args:
        model: ``(N, C, H, W) -> (N, K)``.
        encoding: RGB in [0, 1] -> model input, on the device.
        eval_loss: ``(logits, target) -> scalar``; its ``probabilities`` convert logits to confidences.
        task: Objective of a training step; like all arguments below, it is not needed for validation.
        optimizer: ``parameters -> Optimizer``.
        schedule: Learning rate of each optimizer step.
        steps_per_epoch: Optimizer steps in an epoch.
        mix: MixUp/CutMix on float RGB.
        gradient_clip_val, gradient_clip_algorithm: ``"agc"`` with its clip factor, or ``"norm"``/``"value"``.
        channels_last: Memory format of the input.
        compiled_batch_size: Compile the model for training steps with batches of this size; see
            :class:`~bcos_train.training.compilation.CompiledNetwork`. ``None``: don't compile.
        log_every_n_steps: Optimizer steps between computations of ``gradient_norm``.
        is_multi_label: Labels are multi-hot.
        group_names: Groups of the images, for the accuracy on each of them in validation; ``None``: none.
        seed: Seeds dropout, stochastic depth and mixing of each step by f(seed, step, rank).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        encoding: BcosEncoding | Standardize,
        eval_loss: nn.Module,
        task: Task | None = None,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        schedule: Schedule | None = None,
        steps_per_epoch: int = 1,
        mix: nn.Module | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "agc",
        channels_last: bool = False,
        compiled_batch_size: int | None = None,
        log_every_n_steps: int = 50,
        is_multi_label: bool = False,
        group_names: Sequence[str] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model = model
        self.task, self.eval_loss = task, eval_loss
        self.build_optimizer, self.schedule, self.steps_per_epoch = optimizer, schedule, steps_per_epoch
        self.encoding, self.mix = encoding, mix
        self.clip_val, self.clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Not a submodule, which would duplicate each entry of the state dict.
        self.network = Network(model) if compiled_batch_size is None else CompiledNetwork(model, compiled_batch_size)
        self._evaluation = contextlib.ExitStack()
        self.log_every_n_steps = log_every_n_steps
        self.seed = seed
        self.is_multi_label, self.group_names = is_multi_label, group_names
        self.train_score = MultiLabelScore() if is_multi_label else ClassificationScore()
        self.val_score = self.new_val_score()
        self.gradient_norm: Tensor | None = None
        self.last_loss = float("nan")
        #: ``logs`` of the task in the latest step.
        self.task_logs: Mapping[str, Tensor] = {}
        #: ``votes()`` is called once per batch and returns this process's requests, the same number in each process.
        #: ``reduced_votes`` says for each of them whether any process has made it in the latest batch. They are reduced
        #: together with the loss, so that a step waits for the device only once. `Checkpointer` sets and reads them.
        self.votes: Callable[[], Sequence[bool]] = tuple
        self.reduced_votes: list[bool] = []
        #: Scores of the latest validation: ``loss``, ``count`` and the others of the module's score.
        self.val_result: dict[str, float] = {}
        #: Latest value of each metric logged in this epoch.
        self.epoch_metrics: dict[str, float] = {}

    def new_val_score(self) -> ClassificationScore | MultiLabelScore:
        """Return an empty score for a validation."""
        if self.is_multi_label:
            return MultiLabelScore(average_precision=True)
        return ClassificationScore(self.group_names)

    def update_val_score(self, score: ClassificationScore | MultiLabelScore, logits: Tensor, batch: Batch) -> None:
        """Add a batch of a validation to a score."""
        groups = None if batch.extras is None else batch.extras.get("groups")
        score.update(self.eval_loss(logits, batch.labels), logits, batch.labels, groups)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(N, K)`` of uint8 RGB images ``(N, 3, H, W)``."""
        return self.model(self.encode(images))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert logits ``(N, K)`` to probabilities ``(N, K)``, by sigmoid or softmax depending on the loss."""
        return self.eval_loss.probabilities(logits)  # type: ignore[operator]

    @property
    def compilation(self) -> str | None:
        """Description of how the model is compiled for training, or None."""
        return str(self.network) if isinstance(self.network, CompiledNetwork) else None

    @property
    def data(self) -> DataModule:
        """Data module of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, DataModule)
        return data

    def log_now(self, metrics: Mapping[str, float]) -> None:
        """Pass metrics to all loggers, under the number of optimizer steps taken, and to callbacks.

        ``self.log`` passes them to the loggers only after the hooks of the batch or epoch, and thus after a checkpoint
        is saved there: a run that stops in between would lose them.
        """
        self.epoch_metrics.update(metrics)
        self.log_dict(dict(metrics), logger=False, rank_zero_only=True)
        for logger in self.trainer.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=self.global_step)

    def encode(self, images: Tensor) -> Tensor:
        """Convert uint8 RGB images to the model's input, in its memory format."""
        return self.encode_floats(to_float(images))

    def encode_floats(self, floats: Tensor) -> Tensor:
        """Convert RGB images in [0, 1] to the model's input, in its memory format."""
        return self.encoding.encode(floats).contiguous(memory_format=self.memory_format)

    # ---- training

    def on_train_epoch_start(self) -> None:
        self.epoch_metrics.clear()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        _seed(step_seed(self.seed, step, self.global_rank), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        floats, target = to_float(batch.images), batch.labels
        if self.mix is not None:
            floats, target = self.mix(floats, target)
        assert self.task is not None, "a module without a task can only validate"
        step = batch_idx // self.trainer.accumulate_grad_batches
        x, epoch = self.encode_floats(floats), self.current_epoch
        view = TrainingBatch(x, target, floats, batch.indices, batch.extras, epoch, step)
        output = self.task(self.network, view)
        self._stop_if_not_finite(output.loss, output.logits, batch.indices, batch_idx)
        self.train_score.update(output.loss, output.logits, target)
        self.task_logs = output.logs
        return output.loss

    def _stop_if_not_finite(self, loss: Tensor, logits: Tensor, indices: Tensor, batch_idx: int) -> None:
        # The only synchronization with the device in a step. If the loss is not finite in one process only, the others
        # must stop too: they would wait for it forever.
        self.last_loss, self.reduced_votes = mean_and_votes(loss, self.votes())
        if not math.isfinite(self.last_loss):
            rows = ~logits.detach().isfinite().all(1)
            samples = indices[rows] if rows.any() else indices
            raise NonFiniteLoss(
                f"the loss is not finite ({loss.item()}) in epoch {self.current_epoch + 1} of "
                f"{self.trainer.max_epochs}, batch {batch_idx + 1} of {self.trainer.num_training_batches}, after "
                f"{self.global_step} optimizer steps; samples {samples.tolist()[:16]}. The step was not taken; "
                "try a lower optimizer.lr, a longer warm-up, gradient clipping or trainer.precision=32.",
                is_elsewhere=math.isfinite(loss.item()),
            )

    def stop_if_not_finite_weights(self) -> None:
        """Raise :class:`NonFiniteLoss` before such weights are saved: a finite loss can have infinite gradients."""
        keys = [key for key, value in self.model.state_dict().items() if not bool(value.isfinite().all())]
        # Statistics differ between processes.
        if max_over_processes(len(keys), self.device):
            names = ", ".join(keys[:3]) or "those of another process"
            raise NonFiniteLoss(
                f"weights are not finite ({names}) after {self.global_step} optimizer steps. They were not saved; "
                "try a lower optimizer.lr, a longer warm-up, gradient clipping or trainer.precision=32.",
                is_elsewhere=not keys,
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        schedule = self.schedule
        assert self.build_optimizer is not None
        assert schedule is not None
        optimizer = self.build_optimizer([p for p in self.model.parameters() if p.requires_grad])
        bases = [group["lr"] for group in optimizer.param_groups]

        def factor(base: float) -> Callable[[int], float]:
            return lambda step: schedule.lr(step, self.steps_per_epoch, base) / base if base else 0.0

        scheduler = LambdaLR(optimizer, [factor(base) for base in bases])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if (self.global_step + 1) % self.log_every_n_steps == 0:
            self.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_val is None:
            return
        if self.clip_algorithm == "agc":
            adaptive_clip_grad_(parameters, clip_factor=self.clip_val)
        else:
            self.clip_gradients(optimizer, self.clip_val, self.clip_algorithm)

    # ---- validation

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch.images)
        self.update_val_score(self.val_score, logits, batch)
        return {"logits": logits}

    def on_validation_epoch_start(self) -> None:
        broadcast_buffers(self.model)
        self.val_score.reset()
        self.end_evaluation()
        self._evaluation.enter_context(without_tf32())
        self._evaluation.enter_context(cached_weights(self.model))

    def end_evaluation(self) -> None:
        """Stop caching weights and allow TF32 again."""
        self._evaluation.close()

    def on_validation_epoch_end(self) -> None:
        self.end_evaluation()
        score = self.val_score.compute()
        num_val, skipped = self.data.num_val, sum_over_processes(self.data.count_skipped("eval"), self.device)
        assert score["count"] + skipped == num_val, f"{score['count']} of {num_val} validation samples were counted"
        if skipped:  # the scores are those of the others
            score["skipped"] = skipped
        self.val_result = score
        self.log_now({f"val/{key}": value for key, value in score.items() if key != "count"})

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        # Lightning's entry would contain all submodules, under different names.
        del checkpoint["state_dict"]
        checkpoint["model"] = self.model.state_dict()
        checkpoint["class_names"] = [str(name) for name in self.data.class_names]
        checkpoint["images"] = self.data.inventory
        epoch, step = divmod(self.global_step, self.steps_per_epoch)
        checkpoint["position"] = {"epoch": epoch, "step": step, "steps_per_epoch": self.steps_per_epoch}
        with self.train_score.sync_context(dist_sync_fn=gather_all_tensors, should_sync=is_distributed()):
            checkpoint["train_score"] = {key: value.clone() for key, value in self.train_score.state_dict().items()}

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        checkpoint["state_dict"] = self.state_dict() | {f"model.{k}": v for k, v in checkpoint["model"].items()}
        self.data.seek(*move_to_position(checkpoint, self.steps_per_epoch, self.trainer.accumulate_grad_batches))
        if self.trainer.is_global_zero:
            # The saved score is the sum over all processes.
            checkpoint["state_dict"] |= {f"train_score.{k}": v for k, v in checkpoint["train_score"].items()}


class EndEvaluation(pl.Callback):
    """Ends a validation that raises an exception."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.end_evaluation()


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of one device; on the CPU the same as ``torch.manual_seed``.

    ``torch.manual_seed`` seeds all devices of all types and, for types not initialized yet, records the call with its
    stack trace, which takes 0.7 ms per step instead of 2 µs.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
