"""Lightning's trainer as this project uses it, and the words with which a run begins."""

import os
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from rich.console import Console
from torch import nn

from bcos_train.dataset.data_module import DataModule
from bcos_train.nn import RunningNorm2d
from bcos_train.training.checkpoint import VerifiedCheckpointIO
from bcos_train.training.options import BatchSplit, TrainerOptions
from bcos_train.training.run_folder import RunFolder

_PRECISION: dict[Any, Any] = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def build_trainer(options: TrainerOptions, accumulate: int = 1) -> pl.Trainer:
    """A trainer whose data order, checkpoints and signals are ours, still without loggers and callbacks."""
    strategy: str | Strategy = "auto"
    if options.world_size > 1:
        # Buffers are broadcast before a validation instead (see training.distributed.broadcast_buffers).
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    plugins: list[Any] = [VerifiedCheckpointIO()]
    if "SLURM_PROCID" in os.environ and options.world_size > 1 and "RANK" not in os.environ:
        # Requeueing saves within the signal handler, at whatever line that interrupts.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=options.processes_per_node,
        num_nodes=options.num_nodes,
        strategy=strategy,
        precision=_PRECISION[str(options.precision)],
        max_epochs=options.max_epochs,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=options.val_every_n_epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every_n_steps,
        deterministic=options.deterministic,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # The run folder is known only once the processes can talk to each other; both are added then.
        logger=False,
        enable_checkpointing=False,
        plugins=plugins,
    )


def print_banner(
    console: Console,
    parts: Any,
    model_name: str,
    model: nn.Module,
    data: DataModule,
    split: BatchSplit,
    folder: RunFolder,
) -> None:
    """What is about to run, a line each. ``parts`` is a :class:`bcos_train.run.TrainConfig`."""
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
        "folder": str(folder.path),
        "state": state,
    }
    for key, text in lines.items():
        console.print(f"{key:>10}  {text}", highlight=False, markup=False, soft_wrap=True)


def _statistics(model: nn.Module, split: BatchSplit, options: TrainerOptions) -> str:
    if not any(isinstance(m, RunningNorm2d | nn.BatchNorm2d) for m in model.modules()):
        return ""
    images = split.per_device * (split.world if options.sync_batchnorm else 1)
    return f"; batch statistics over {images} images"
