"""Build the parts of a run: Lightning's trainer as this project uses it, data, model, module, loggers, callbacks."""

import inspect
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bcos_train.augmentation import BatchMix
from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import allow_tf32
from bcos_train.nn import sync_batch_norm_
from bcos_train.optimizer import prefer_fused
from bcos_train.runs.folder import RunFolder
from bcos_train.runs.interrupt import StopFlag
from bcos_train.runs.layout import EXPLANATIONS
from bcos_train.task import Classification, Task
from bcos_train.training.callbacks.checkpoint import Checkpointer
from bcos_train.training.callbacks.ema import EmaCallback, ema_decay
from bcos_train.training.callbacks.explanations import ExplanationCallback
from bcos_train.training.callbacks.progress import ProgressDisplay, TrainingLog
from bcos_train.training.checkpoint_io import VerifiedCheckpointIO
from bcos_train.training.config import CommonConfig, TrainConfig
from bcos_train.training.module import Classifier, EndEvaluation
from bcos_train.training.options import BatchSplit, TrainerOptions, default_workers

#: torch 2.15 renamed DDP's switch for broadcasting buffers at each forward pass.
_BUFFERS = next(
    key
    for key in ("forward_sync_buffers", "broadcast_buffers")
    if key in inspect.signature(DistributedDataParallel).parameters
)
_PRECISION: dict[Any, Any] = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def build_trainer(options: TrainerOptions, accumulate: int = 1) -> pl.Trainer:
    """A trainer whose data order, checkpoints and signals are ours, still without loggers and callbacks.

    Raises:
        ValueError: The machine has no such accelerator, or it can't compute with that precision.
    """
    if options.uses_cuda:
        allow_tf32(options.tf32)
    strategy: str | Strategy = "auto"
    if options.world_size > 1:
        # Buffers are broadcast before a validation instead (see training.distributed.broadcast_buffers).
        buffers: dict[str, Any] = {_BUFFERS: False}
        strategy = DDPStrategy(gradient_as_bucket_view=True, **buffers)
    plugins: list[Any] = [VerifiedCheckpointIO()]
    if "SLURM_PROCID" in os.environ and options.world_size > 1 and "RANK" not in os.environ:
        # Requeueing saves within the signal handler, at whatever line that interrupts.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    precision = _PRECISION[str(options.precision)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported.*")
            trainer = _make_trainer(options, accumulate, strategy, precision, plugins)
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(f"trainer.accelerator={options.accelerator}: {error}") from error
    if trainer.precision != precision:
        # Lightning takes another one with no more than a warning.
        raise ValueError(f"trainer.precision={options.precision} needs a GPU: take bf16 or 32")
    # Lightning asks all processes before each batch whether it has seen SIGTERM, and waits for the answer. Signals are
    # ours: the Checkpointer asks about them together with the loss.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    return trainer


def _nothing() -> None:
    pass


def _make_trainer(
    options: TrainerOptions, accumulate: int, strategy: str | Strategy, precision: Any, plugins: list[Any]
) -> pl.Trainer:
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.processes_per_node,
        num_nodes=options.num_nodes,
        strategy=strategy,
        precision=precision,
        max_epochs=options.max_epochs,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=options.val_every_n_epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every_n_steps,
        deterministic=options.deterministic,
        # cuDNN times its algorithms for each new shape, rather than guess.
        benchmark=options.uses_cuda and not options.deterministic,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # The run folder is known only once the processes can talk to each other; both are added then.
        logger=False,
        enable_checkpointing=False,
        callbacks=[EndEvaluation()],
        plugins=plugins,
    )


def build_model(settings: CommonConfig, data: DataModule) -> nn.Module:
    """Build the model with random weights; the first use of the seed, as in the official code.

    Raises:
        UserError: The model can't be built so, or doesn't go with the data set or the encoding.
    """
    pl.seed_everything(settings.seed, verbose=False)
    with user_errors_at("model"):
        model: nn.Module = settings.model(num_classes=choose_num_classes(settings, data))
    channels = getattr(model, "in_chans", settings.encoding.in_channels)
    if channels != settings.encoding.in_channels:
        given = {3: "3 channels, r g b", 6: "6 channels, r g b 1-r 1-g 1-b"}[settings.encoding.in_channels]
        raise UserError(f"model.in_chans={channels}: the encoding of this model's images gives {given}")
    if settings.trainer.sync_batchnorm and settings.trainer.world_size > 1:
        sync_batch_norm_(model)
    if settings.trainer.uses_channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def choose_num_classes(settings: CommonConfig, data: DataModule) -> int:
    """Return the model's number of classes: the data set's, or more if the config says so.

    Raises:
        UserError: It says fewer.
    """
    num_classes: int | None = getattr(settings.model, "keywords", {}).get("num_classes")
    if num_classes is not None and num_classes < data.num_classes:
        raise UserError(f"model.num_classes={num_classes}: {data.dataset.name} has {data.num_classes} classes")
    return data.num_classes if num_classes is None else num_classes


def load_data(settings: CommonConfig, split: BatchSplit, trainer: pl.Trainer, stage: str = "fit") -> DataModule:
    """Build the data module and read the index of the data set, on one process of each node first."""
    with user_errors_at("dataset"):
        data = DataModule(
            settings.dataset,
            train_transform=settings.augmentation.train,
            eval_transform=settings.augmentation.eval,
            batch_size=split.batch,
            num_workers=default_workers() if settings.num_workers is None else settings.num_workers,
            seed=settings.seed,
            repetitions=settings.augmentation.repetitions,
            accumulate=split.accumulate,
            pin_memory=settings.trainer.uses_cuda,
            limit_train=settings.limit_train,
            limit_val=settings.limit_val,
        )
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier("prepare_data")
        data.setup(stage)
    return data


def build_task(settings: TrainConfig) -> Task:
    """Build what a training step optimizes."""
    return Classification(settings.loss)


def build_module(settings: TrainConfig, model: nn.Module, data: DataModule, compiled: bool) -> Classifier:
    """Build the module that trains ``model``."""
    augmentation, options = settings.augmentation, settings.trainer
    with user_errors_at("augmentation"):
        mix = BatchMix(choose_num_classes(settings, data), augmentation.mixup_alpha, augmentation.cutmix_alpha)
    return Classifier(
        model,
        encoding=settings.encoding,
        eval_loss=settings.eval_loss,
        task=build_task(settings),
        # The scaler of 16 bits and clipping need the gradients as they are.
        optimizer=settings.optimizer if str(options.precision) == "16" else prefer_fused(settings.optimizer),
        schedule=settings.schedule,
        steps_per_epoch=data.steps_per_epoch,
        mix=mix,
        gradient_clip_val=options.gradient_clip_val,
        gradient_clip_algorithm=options.gradient_clip_algorithm,
        channels_last=options.uses_channels_last,
        compiled=compiled,
        log_every_n_steps=options.log_every_n_steps,
        seed=settings.seed,
    )


def build_loggers(settings: TrainConfig, folder: RunFolder) -> list[Logger]:
    """Build the loggers beside the CSV file."""
    try:
        return [make(folder=folder.path, run_id=folder.name) for make in (settings.logger or {}).values()]
    except ModuleNotFoundError as error:
        raise UserError(f"logger: {' '.join(str(error).split())}") from error


def build_callbacks(
    settings: TrainConfig, data: DataModule, title: str, folder: RunFolder, console: Console, stop: StopFlag
) -> list[pl.Callback]:
    """Build the callbacks, in the order in which their hooks run: measure, average, explain, show, save."""
    callbacks: list[pl.Callback] = [TrainingLog()]
    if settings.ema is not None:
        every, epochs = settings.ema.every_n_steps, settings.trainer.max_epochs
        warmup_steps = round(settings.schedule.warmup(data.steps_per_epoch) * data.steps_per_epoch)
        callbacks.append(
            EmaCallback(ema_decay(settings.ema.decay, data.batch_size, every, epochs), every, warmup_steps)
        )
    if settings.explanation is not None:
        callback = ExplanationCallback(settings.explanation, folder.path / EXPLANATIONS, title)
        callbacks.append(callback)
    if settings.trainer.progress:
        callbacks.append(ProgressDisplay(console))
    return [*callbacks, Checkpointer(folder.checkpoints, settings.checkpointing, stop)]
