"""Build the parts of a run: trainer, data, model, module, loggers, callbacks."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bcos_train.augmentation import BatchMix
from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset import ImageSource
from bcos_train.dataset.classes import with_model_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import allow_tf32
from bcos_train.model import create_model
from bcos_train.model.registry import OFFICIAL
from bcos_train.nn import sync_batch_norm_
from bcos_train.optimizer import prefer_fused
from bcos_train.runs import checkpoint as files
from bcos_train.runs.checkpoint import Checkpoint
from bcos_train.runs.folder import RunFolder
from bcos_train.runs.interrupt import StopFlag
from bcos_train.runs.launcher import launched
from bcos_train.runs.layout import EXPLANATIONS
from bcos_train.task import Classification, DistillationTask, Task
from bcos_train.training.callbacks.checkpoint import Checkpointer
from bcos_train.training.callbacks.distillation import DistillationCallback, distillation_metrics
from bcos_train.training.callbacks.ema import EmaCallback, ema_decay
from bcos_train.training.callbacks.explanations import ExplanationCallback, GalleryCallback, metric_names
from bcos_train.training.callbacks.metrics import TrainingLog
from bcos_train.training.callbacks.progress import ProgressDisplay
from bcos_train.training.config import CommonConfig, TrainConfig
from bcos_train.training.distillation import build_distillation
from bcos_train.training.distributed import from_rank_zero
from bcos_train.training.environment import LaunchedEnvironment
from bcos_train.training.guidance import GUIDANCE_METRICS, build_guidance
from bcos_train.training.module import Classifier, EndEvaluation
from bcos_train.training.options import BatchSplit, TrainerOptions, default_workers
from bcos_train.training.score import score_names
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.weights.source import read_model_weights

#: Data set -> data set with the classes of a trained model.
MatchClasses = Callable[[ImageSource], ImageSource]

#: DDP's argument for broadcasting buffers at each forward pass, renamed in torch 2.15.
_SYNC_BUFFERS = next(
    key
    for key in ("forward_sync_buffers", "broadcast_buffers")
    if key in inspect.signature(DistributedDataParallel).parameters
)
_PRECISION: dict[str, Literal["32-true", "16-mixed", "bf16-mixed"]] = {
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}


class VerifiedCheckpointIO(CheckpointIO):
    """Makes Lightning use the checkpoint files of :mod:`bcos_train.runs.checkpoint`."""

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: object = None) -> None:
        files.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: str | torch.device | None = None, weights_only: bool | None = None
    ) -> Checkpoint:
        return files.load(Path(path), map_location="cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        files.delete(Path(path))


def build_trainer(options: TrainerOptions, accumulate: int = 1) -> pl.Trainer:
    """Build a trainer that leaves data order, checkpoints and signals to this package, without loggers and callbacks.

    Raises:
        ValueError: The accelerator isn't available or doesn't support the precision.
    """
    if options.uses_cuda:
        allow_tf32(options.tf32)
    strategy: str | Strategy = "auto"
    if options.world_size > 1:
        # Buffers are broadcast before a validation instead (see training.distributed.broadcast_buffers).
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        strategy = DDPStrategy(gradient_as_bucket_view=True, **buffers)
    environment = LaunchedEnvironment(launched() if options.world_size > 1 else None, options.processes_per_node)
    plugins: list[CheckpointIO | ClusterEnvironment] = [VerifiedCheckpointIO(), environment]
    precision = _PRECISION[str(options.precision)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported.*")
            trainer = _make_trainer(options, accumulate, strategy, precision, plugins)
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(f"trainer.accelerator={options.accelerator}: {error}") from error
    if trainer.precision != precision:
        # Lightning only warns and uses a different one.
        raise ValueError(f"trainer.precision={options.precision} needs a GPU: use bf16 or 32")
    # Lightning takes the rank that logs from variables that may be left over.
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    # Before each batch Lightning broadcasts whether it has received SIGTERM, and waits for it. Here the Checkpointer
    # handles signals, and shares them together with the loss.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _make_trainer(
    options: TrainerOptions,
    accumulate: int,
    strategy: str | Strategy,
    precision: Literal["32-true", "16-mixed", "bf16-mixed"],
    plugins: list[CheckpointIO | ClusterEnvironment],
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
        # cuDNN measures its algorithms for each new shape.
        benchmark=options.uses_cuda and not options.deterministic,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Both are added once the run folder is known, for which the processes have to communicate.
        logger=False,
        enable_checkpointing=False,
        callbacks=[EndEvaluation()],
        plugins=[*plugins],
    )


def build_model(settings: CommonConfig, data: DataModule) -> nn.Module:
    """Seed the generators and build the model with random weights; nothing is seeded before, as in the official code.

    Raises:
        UserError: The model can't be built, or is incompatible with the data set or the encoding.
    """
    pl.seed_everything(settings.seed, verbose=False)
    with user_errors_at("model"):
        model: nn.Module = settings.model(num_classes=choose_num_classes(settings, data))
    channels = getattr(model, "in_chans", settings.encoding.in_channels)
    if channels != settings.encoding.in_channels:
        order = {3: ", r g b", 6: ", r g b 1-r 1-g 1-b"}.get(settings.encoding.in_channels, "")
        raise UserError(f"model.in_chans={channels}: the encoding has {settings.encoding.in_channels} channels{order}")
    if settings.trainer.sync_batchnorm and settings.trainer.world_size > 1:
        sync_batch_norm_(model)
    if settings.trainer.uses_channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def choose_num_classes(settings: CommonConfig, data: DataModule) -> int:
    """Return the model's number of classes: that of the data set, or a larger one from the config.

    Raises:
        UserError: The config has a smaller one, or a larger one although labels are multi-hot.
    """
    num_classes = settings.num_classes
    if num_classes is not None and data.is_multi_label and num_classes != data.num_classes:
        problem = f"{data.dataset.name} has {data.num_classes} classes, and several labels per image: omit the key"
        raise UserError(f"model.num_classes={num_classes}: {problem}")
    if num_classes is not None and num_classes < data.num_classes:
        raise UserError(f"model.num_classes={num_classes}: {data.dataset.name} has {data.num_classes} classes")
    return data.num_classes if num_classes is None else num_classes


def keep_initial_classes(settings: CommonConfig) -> MatchClasses:
    """Return a function that matches a data set with the weights that training starts from.

    With another number of classes, the classifier is a new one, so there is nothing to match.

    Raises:
        UserError: The weights can't be read.
    """
    options = settings.model.keywords
    weights = OFFICIAL if options.get("pretrained") else options.get("weights")
    if settings.model.func is not create_model or weights is None:
        return partial(with_model_classes, class_names=None, label="a model without trained weights")
    with user_errors_at("model"):
        source = read_model_weights(settings.model_name, weights)
    names, label = source.class_names, source.label

    def match(dataset: ImageSource) -> ImageSource:
        is_mapped = getattr(dataset, "class_map", None) is not None
        if not is_mapped and names is not None and len(names) != dataset.num_classes:
            return dataset
        hint = "to train other classes, use a file without class names (.pth) from scripts/export_weights.py"
        return with_model_classes(dataset, names, label, hint)

    return match


def load_data(
    settings: CommonConfig, split: BatchSplit, trainer: pl.Trainer, match_classes: MatchClasses, stage: str = "fit"
) -> DataModule:
    """Build the data module and read the index of the data set, on one process of each node first.

    Args:
        match_classes: Compares or maps the classes, see :func:`bcos_train.dataset.classes.with_model_classes`.

    Raises:
        UserError: The data set is missing or empty, or has a single class, on which any model is always right; or its
            classes are not those of the trained model.
    """
    with user_errors_at("dataset"):
        data = DataModule(
            settings.dataset,
            train_transform=settings.augmentation.train,
            eval_transform=settings.augmentation.eval,
            batch_size=split.batch,
            num_workers=default_workers() if settings.num_workers is None else settings.num_workers,
            seed=settings.seed,
            repetitions=settings.augmentation.repetitions,
            drop_last=settings.drop_last,
            accumulate=split.accumulate,
            pin_memory=settings.trainer.uses_cuda,
            limit_train=settings.limit_train,
            limit_val=settings.limit_val,
        )
        if trainer.local_rank == 0 and not trainer.is_global_zero:
            data.prepare_data()
        from_rank_zero(trainer, lambda: _prepare(data, match_classes))
        trainer.strategy.barrier("prepare_data")
        data.dataset = match_classes(data.dataset)
        data.setup(stage)
        if data.num_val == 0 or (stage == "fit" and data.num_train == 0):
            raise ValueError(f"{data.dataset.name} has no {'training' if data.num_val else 'validation'} images")
        data.check_num_val(trainer.world_size)
        if stage == "fit" and data.steps_per_epoch == 0:
            raise ValueError(
                f"{data.num_train} training images are fewer than batch_size={split.batch}: drop_last=false"
            )
        if stage == "fit" and data.num_classes < 2:
            raise ValueError(f"{', '.join(data.class_names)} is the only class; a classifier needs at least two")
    if settings.explanation is not None:
        with user_errors_at(""):
            settings.explanation.check_boxes(data.has_boxes, data.dataset.name)
    return data


def _prepare(data: DataModule, match_classes: MatchClasses) -> None:
    with user_errors_at("dataset"):
        data.prepare_data()
        _ = data.class_names
    with user_errors_at(""):
        match_classes(data.dataset)


def build_task(settings: TrainConfig, model: nn.Module, data: DataModule) -> Task:
    """Build the objective of a training step.

    Raises:
        UserError: The settings of the task don't fit the model or the data, or there are two tasks.
    """
    if settings.guidance is not None and settings.distillation is not None:
        raise UserError("distillation and guidance can't be combined: set one of them to none")
    are_explanations_trained = settings.guidance or (settings.distillation and settings.distillation.explanation_weight)
    if are_explanations_trained and str(settings.trainer.precision) == "16":
        raise UserError("trainer.precision=16: the gradients of explanations would underflow; use bf16 or 32")
    if settings.guidance is not None:
        return build_guidance(settings, settings.guidance, model, data)
    if (options := settings.distillation) is not None:
        return build_distillation(settings, options, model, data, choose_num_classes(settings, data))
    return Classification(settings.loss)


def build_module(
    settings: TrainConfig, model: nn.Module, data: DataModule, task: Task, compiled_batch_size: int | None
) -> Classifier:
    """Build the module that trains ``model``."""
    augmentation, options = settings.augmentation, settings.trainer
    with user_errors_at("augmentation"):
        mix = BatchMix(choose_num_classes(settings, data), augmentation.mixup_alpha, augmentation.cutmix_alpha)
    return Classifier(
        model,
        encoding=settings.encoding,
        eval_loss=settings.eval_loss,
        task=task,
        # With 16 bits the gradients must be unscaled before clipping, not in a fused step.
        optimizer=settings.optimizer if str(options.precision) == "16" else prefer_fused(settings.optimizer),
        schedule=settings.schedule,
        steps_per_epoch=data.steps_per_epoch,
        mix=mix,
        gradient_clip_val=options.gradient_clip_val,
        gradient_clip_algorithm=options.gradient_clip_algorithm,
        channels_last=options.uses_channels_last,
        compiled_batch_size=compiled_batch_size,
        log_every_n_steps=options.log_every_n_steps,
        is_multi_label=data.is_multi_label,
        group_names=data.group_names,
        seed=settings.seed,
    )


def build_loggers(settings: TrainConfig, folder: RunFolder) -> list[Logger]:
    """Build the loggers other than the CSV file."""
    try:
        return [build(folder=folder.path, run_id=folder.name) for build in (settings.logger or {}).values()]
    except ModuleNotFoundError as error:
        raise UserError(f"logger: {' '.join(str(error).split())}") from error


def check_monitor(settings: TrainConfig) -> None:
    """Check before the training that it logs ``checkpointing.monitor``.

    A name in ``explanation/alignment/`` is that of a layer, which only the measurement knows; the checkpoint callback
    reports a wrong one after the first measurement.

    Raises:
        UserError: No metric has this name.
    """
    labels = getattr(settings.dataset, "is_multi_label", False), getattr(settings.dataset, "group_names", None)
    monitor = settings.checkpointing.resolve_monitor(labels[0]).monitor
    parts = ["val", "train", *(["val_ema"] if settings.ema is not None else [])]
    names = [f"{part}/{name}" for part in parts for name in score_names(*labels, part != "train")]
    names += ["train/loss_step", "lr", "gradient_norm", "images_per_second"]
    names += [] if settings.guidance is None else GUIDANCE_METRICS
    names += [] if settings.distillation is None else distillation_metrics(settings.distillation)
    names += [] if settings.explanation is None else metric_names(settings.explanation)
    is_layer = monitor is not None and "explanation/alignment" in names and monitor.startswith("explanation/alignment/")
    if monitor is None or settings.checkpointing.keep_best == 0 or monitor in names or is_layer:
        return
    raise UserError(
        f"checkpointing.monitor={monitor}: no such metric is logged{suggest(monitor, names)} "
        f"(logged are {join_words(names, 'and', len(names))})"
    )


def check_optimizer(build: partial[Optimizer]) -> None:
    """Check the optimizer's settings before the training.

    Raises:
        UserError: The optimizer refuses a value; the message begins with its key if it is a single one.
    """

    def problem(build: partial[Optimizer]) -> str | None:
        try:
            build([nn.Parameter(torch.zeros(1, 1))])
        except ValueError as error:
            return " ".join(str(error).split())
        except TypeError:  # a value that the optimizer can't do without
            return ""
        return None

    if (message := problem(build)) is None:
        return
    if message.startswith("optimizer."):
        raise UserError(message)
    for key, value in build.keywords.items():
        others = {name: other for name, other in build.keywords.items() if name != key}
        if problem(partial(build.func, **others)) is None:
            raise UserError(f"optimizer.{key}={value}: {message}")
    raise UserError(f"optimizer: {message}")


def build_callbacks(
    settings: TrainConfig, data: DataModule, task: Task, title: str, folder: RunFolder, console: Console, stop: StopFlag
) -> list[pl.Callback]:
    """Build the callbacks in the order of their hooks: metrics, average, explanations, progress, checkpoint, gallery.

    The checkpoint may be selected by an explanation metric; the gallery comes after it.
    """
    callbacks: list[pl.Callback] = [TrainingLog()]
    after: list[pl.Callback] = []
    if settings.ema is not None:
        every, epochs = settings.ema.every_n_steps, settings.trainer.max_epochs
        warmup_steps = round(settings.schedule.warmup(data.steps_per_epoch) * data.steps_per_epoch)
        decay = ema_decay(settings.ema.decay, data.batch_size, every, epochs)
        callbacks.append(EmaCallback(decay, every, warmup_steps))
    distillation = task if isinstance(task, DistillationTask) else None
    if distillation is not None:
        callbacks.append(DistillationCallback(distillation, console))
    if settings.explanation is not None:
        explanations = ExplanationCallback(settings.explanation, folder.path / EXPLANATIONS, title, distillation)
        callbacks.append(explanations)
        after.append(GalleryCallback(explanations))
    if settings.trainer.progress:
        callbacks.append(ProgressDisplay(console))
    return [*callbacks, Checkpointer(folder.checkpoints, settings.checkpointing, stop), *after]
