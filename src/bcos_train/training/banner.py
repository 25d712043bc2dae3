"""The start-up banner."""

from rich.console import Console
from torch import nn

from bcos_train.dataset.data_module import DataModule
from bcos_train.nn import RunningNorm2d
from bcos_train.runs.folder import RunFolder
from bcos_train.task import DistillationTask, Guidance, Task
from bcos_train.training.config import TrainConfig
from bcos_train.training.options import BatchSplit, TrainerOptions

__all__ = ["print_banner"]


def print_banner(
    console: Console,
    settings: TrainConfig,
    model: nn.Module,
    data: DataModule,
    split: BatchSplit,
    folder: RunFolder,
    compilation: str | None,
    task: Task,
) -> None:
    """Print the main settings of a run, one per line.

    Args:
        compilation: Description of how the model is compiled for training, or ``None``.
    """
    options = settings.trainer
    parameters = sum(p.numel() for p in model.parameters())
    steps = data.steps_per_epoch
    optimizer = settings.optimizer
    optimizer_name = optimizer.keywords.get("name", getattr(optimizer.func, "__name__", "optimizer"))
    state = "new" if folder.resume_from is None else f"resumes from {folder.resume_from}"
    lines = {
        "model": f"{settings.model_name}, {parameters:,} parameters",
        "data": f"{data.dataset.name}: {data.num_train:,} training and {data.num_val:,} validation images, "
        f"{data.num_classes} classes",
        "batch": f"{split}{_statistics(model, split, options)}",
        "length": f"{options.max_epochs} epochs x {steps:,} steps = {options.max_epochs * steps:,} optimizer steps",
        "optimizer": f"{optimizer_name}, learning rate {optimizer.keywords.get('lr', '?')}",
        "device": f"{options.world_size} x {'cuda' if options.uses_cuda else 'cpu'}, precision {options.precision}, "
        f"seed {settings.seed}",
        "compile": f"{compilation}: the first step may take minutes (trainer.compile=false avoids this)",
        "folder": str(folder.path),
        "state": state,
    }
    if compilation is None:
        del lines["compile"]
    if isinstance(task, DistillationTask):
        lines |= {"teacher": task.teacher.label}
    if isinstance(task, Guidance):
        lines |= {"guidance": _guidance(task)}
    for key, text in lines.items():
        console.print(f"{key:>10}  {text}", soft_wrap=True)


def _guidance(task: Guidance) -> str:
    options, n_boxes = task.options, "all" if task.annotated is None else f"{int(task.annotated.sum()):,}"
    start = f", from epoch {options.start_epoch + 1}" if options.start_epoch else ""
    where = f"{options.method} at {options.layer}, boxes of {n_boxes} training images"
    return f"{options.loss}, weight {options.weight:g} per image, {where}{start}"


def _statistics(model: nn.Module, split: BatchSplit, options: TrainerOptions) -> str:
    if not any(isinstance(m, RunningNorm2d | nn.BatchNorm2d) for m in model.modules()):
        return ""
    images = split.per_device * (split.world if options.sync_batchnorm else 1)
    return f"; batch statistics over {images} images"
