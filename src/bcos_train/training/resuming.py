"""Resuming: whether a checkpoint is one of the run, and a position that differs from the one Lightning saved."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bcos_train.dataset.classes import OtherClasses, check_same_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.inventory import OtherImages, check_same_images
from bcos_train.distillation import OtherTeacher, check_same_teacher
from bcos_train.runs.checkpoint import Checkpoint, ForeignCheckpoint
from bcos_train.runs.layout import check_checkpoint_name
from bcos_train.task import DistillationTask, Task
from bcos_train.weights.state_dict import check_weights

__all__ = ["check_resumable", "move_to_position"]

BuildOptimizer = Callable[[Iterable[Tensor]], Optimizer]

#: Entries without which training can't resume.
_KEYS = ("model", "position", "epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")


def check_resumable(
    checkpoint: Checkpoint,
    model: nn.Module,
    build_optimizer: BuildOptimizer,
    data: DataModule,
    task: Task,
    *,
    has_ema: bool,
    data_changed: bool,
) -> None:
    """Compare a checkpoint with the run that is to resume from it.

    Args:
        checkpoint: Its content; the values of tensors are not used.
        model: The model that is to be trained.
        build_optimizer: ``parameters -> Optimizer``.
        data: Its data.
        task: Its objective.
        has_ema: The run averages the weights.
        data_changed: The images may differ from those recorded in the checkpoint.

    Raises:
        OtherClasses: The data set has other classes.
        OtherImages: It has other images.
        OtherTeacher: The teacher has other weights.
        ForeignCheckpoint: Anything else differs or is missing.
    """
    try:
        if (names := checkpoint.get("class_names")) is not None:  # older checkpoints have none of these records
            hint = "restore the class folders, or train another run with resume=false"
            check_same_classes(data.class_names, names, "this run", hint)
        if not data_changed and (images := checkpoint.get("images")) is not None:
            check_same_images(data.inventory, images)
        if isinstance(task, DistillationTask) and (record := checkpoint.get("teacher")) is not None:
            check_same_teacher(task.teacher.record, record)
        for key in (*_KEYS, *(["model_ema"] if has_ema else [])):
            if key not in checkpoint:
                raise ForeignCheckpoint(f"it has no {key}")
        for key in ("model", *(["model_ema"] if has_ema else [])):
            check_weights(model, checkpoint[key], f"its {key}")
        for entry in checkpoint["callbacks"]["Checkpointer"]["best"]:
            check_checkpoint_name(entry["file"])
        _check_position(checkpoint, None if data_changed else data.steps_per_epoch)
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        _check_optimizer(checkpoint, shapes, build_optimizer)
    except (ForeignCheckpoint, OtherClasses, OtherImages, OtherTeacher):
        raise
    except ValueError as error:
        raise ForeignCheckpoint(str(error)) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ForeignCheckpoint(f"its content has another form ({type(error).__name__}: {error})") from error


def _check_position(checkpoint: Checkpoint, steps_per_epoch: int | None) -> None:
    position, steps = checkpoint["position"], checkpoint["global_step"]
    epoch, step, length = position["epoch"], position["step"], position["steps_per_epoch"]
    if steps_per_epoch not in (None, length):
        raise ForeignCheckpoint(f"an epoch has {length} optimizer steps there, here {steps_per_epoch}")
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    taken = progress["optimizer"]["step"]["total"]["completed"]
    begun = checkpoint["epoch"]  # at the end of an epoch, the position is the start of the next one
    is_consistent = 0 <= step < length and steps == taken == epoch * length + step
    if not is_consistent or begun not in ((epoch,) if step else (epoch, epoch - 1)):
        raise ForeignCheckpoint(
            f"its position contradicts itself: epoch {begun}, {steps} and {taken} optimizer steps, {position}"
        )


def _check_optimizer(checkpoint: Checkpoint, shapes: Sequence[torch.Size], build_optimizer: BuildOptimizer) -> None:
    (saved,) = checkpoint["optimizer_states"] or [None]
    if saved is None or len(checkpoint["lr_schedulers"]) != 1:
        raise ForeignCheckpoint("it has no optimizer state")
    (schedule,) = checkpoint["lr_schedulers"]
    taken, _ = schedule["last_epoch"], schedule["lr_lambdas"]
    if (taken, schedule["_step_count"]) != (checkpoint["global_step"], checkpoint["global_step"] + 1):
        raise ForeignCheckpoint(f"its schedule contradicts its {checkpoint['global_step']} optimizer steps")
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(shapes):
        raise ForeignCheckpoint(f"its optimizer state is not of {len(shapes)} parameters")
    names = _names_of_state(build_optimizer)
    if names and checkpoint["global_step"] and not saved["state"]:
        raise ForeignCheckpoint("it has no optimizer state")
    for index, state in saved["state"].items():
        for name in names & state.keys():
            if state[name].shape != shapes[index]:
                raise ForeignCheckpoint(
                    f"its optimizer state doesn't fit: {name} of parameter {index} has the shape "
                    f"{tuple(state[name].shape)}, the parameter {tuple(shapes[index])}"
                )


def _names_of_state(build_optimizer: BuildOptimizer) -> set[str]:
    """Return the names of state tensors with the shape of their parameter; empty if a single step doesn't tell."""
    trial = nn.Parameter(torch.zeros(1, 1))
    trial.grad = torch.zeros_like(trial)
    optimizer = build_optimizer([trial])
    try:
        optimizer.step()
    except Exception:  # an optimizer that needs more than gradients
        return set()
    return {name for name, value in optimizer.state[trial].items() if getattr(value, "shape", None) == trial.shape}


def move_to_position(checkpoint: Checkpoint, steps_per_epoch: int, accumulate: int) -> tuple[int, int]:
    """Return the epoch and optimizer step in it at which training resumes.

    If the length of an epoch has changed, or the number of batches in a step, the position that Lightning saved is
    changed to the one with the same number of optimizer steps, and the score of the interrupted epoch is dropped.

    Args:
        checkpoint: Its entries ``loops`` and ``train_score`` are changed.
        steps_per_epoch: Optimizer steps in an epoch from now on.
        accumulate: Micro-batches in a step from now on.
    """
    saved = checkpoint["position"]
    epoch, step = divmod(checkpoint["global_step"], steps_per_epoch)
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    is_moved = saved["steps_per_epoch"] != steps_per_epoch
    if is_moved or (step and batches["current"]["ready"] != step * accumulate):
        # As in the middle of a step's last batch, which Lightning then counts as completed.
        for count, n in (("current", step), ("total", epoch * steps_per_epoch + step)):
            done = n * accumulate
            batches[count] = {**dict.fromkeys(batches[count], done), "completed": done - bool(step)}
        batches["is_last_batch"] = False
        begun = {**dict.fromkeys(("ready", "started"), epoch + bool(step)), "processed": epoch, "completed": epoch}
        loop["epoch_progress"] = {"total": begun, "current": dict(begun)}
    if is_moved:
        checkpoint["train_score"] = {}
    return epoch, step
