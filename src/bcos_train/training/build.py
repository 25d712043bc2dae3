"""The model of a run, Lightning's trainer as this project uses it, and the words with which a run begins."""

import inspect
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import allow_tf32
from bcos_train.nn import RunningNorm2d, sync_batch_norm_
from bcos_train.runs.folder import RunFolder
from bcos_train.training.checkpoint_io import VerifiedCheckpointIO
from bcos_train.training.module import EndEvaluation
from bcos_train.training.options import BatchSplit, TrainerOptions

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


def build_model(parts: Any, data: DataModule) -> nn.Module:
    """The model with random weights; the seed's first use, as in the official code.

    Args:
        parts: A :class:`bcos_train.run.TrainConfig`.

    Raises:
        UserError: The model can't be built so, or doesn't go with the data set or the encoding.
    """
    pl.seed_everything(parts.seed, verbose=False)
    with user_errors_at("model"):
        model: nn.Module = parts.model(num_classes=choose_num_classes(parts, data))
    channels = getattr(model, "in_chans", parts.encoding.in_channels)
    if channels != parts.encoding.in_channels:
        given = {3: "3 channels, r g b", 6: "6 channels, r g b 1-r 1-g 1-b"}[parts.encoding.in_channels]
        raise UserError(f"model.in_chans={channels}: the encoding of this model's images gives {given}")
    if parts.trainer.sync_batchnorm and parts.trainer.world_size > 1:
        sync_batch_norm_(model)
    if parts.trainer.uses_channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def choose_num_classes(parts: Any, data: DataModule) -> int:
    """The model's number of classes: the data set's, or more if the config says so.

    Raises:
        UserError: It says fewer.
    """
    given: int | None = getattr(parts.model, "keywords", {}).get("num_classes")
    if given is not None and given < data.num_classes:
        raise UserError(f"model.num_classes={given}: {data.dataset.name} has {data.num_classes} classes")
    return data.num_classes if given is None else given


def print_banner(
    console: Console,
    parts: Any,
    model_name: str,
    model: nn.Module,
    data: DataModule,
    split: BatchSplit,
    folder: RunFolder,
    compilation: str | None = None,
) -> None:
    """What is about to run, a line each.

    Args:
        parts: A :class:`bcos_train.run.TrainConfig`.
        compilation: How the model is compiled for training, if it is.
    """
    options: TrainerOptions = parts.trainer
    parameters = sum(p.numel() for p in model.parameters())
    steps = data.steps_per_epoch
    keywords = getattr(parts.optimizer, "keywords", {})
    name = keywords.get("name", getattr(getattr(parts.optimizer, "func", None), "__name__", "optimizer"))
    state = "new" if folder.resume_from is None else f"resumes from {folder.resume_from}"
    lines = {
        "model": f"{model_name}, {parameters:,} parameters",
        "data": f"{data.dataset.name}: {data.num_train:,} training and {data.num_val:,} validation images, "
        f"{data.num_classes} classes",
        "batch": f"{split}{_statistics(model, split, options)}",
        "length": f"{options.max_epochs} epochs x {steps:,} steps = {options.max_epochs * steps:,} optimizer steps",
        "optimizer": f"{name}, learning rate {keywords.get('lr', '?')}",
        "device": f"{options.world_size} x {'cuda' if options.uses_cuda else 'cpu'}, precision {options.precision}, "
        f"seed {parts.seed}",
        "compile": f"{compilation}: the first step takes a while, up to minutes (trainer.compile=false starts at once)",
        "folder": str(folder.path),
        "state": state,
    }
    if compilation is None:
        del lines["compile"]
    for key, text in lines.items():
        console.print(f"{key:>10}  {text}", highlight=False, markup=False, soft_wrap=True)


def _statistics(model: nn.Module, split: BatchSplit, options: TrainerOptions) -> str:
    if not any(isinstance(m, RunningNorm2d | nn.BatchNorm2d) for m in model.modules()):
        return ""
    images = split.per_device * (split.world if options.sync_batchnorm else 1)
    return f"; batch statistics over {images} images"
