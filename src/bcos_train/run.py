"""The wiring: a checked config in, a run folder out. ``train`` and ``evaluate``, and nothing else."""

import contextlib
import errno
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from bcos_train.augmentation import Augmentation, BatchMix
from bcos_train.config import UserError, check, instantiate, load_plugins, overlay, save, user_errors_at
from bcos_train.config import load as load_config
from bcos_train.config.overrides import plugins_in_overrides
from bcos_train.dataset import BcosEncoding, ImageSource, NotCacheable, Standardize, UnevenImages, UnreadableImage
from bcos_train.dataset.data_module import DataModule
from bcos_train.evaluation import ExplanationOptions
from bcos_train.optimizer import prefer_fused
from bcos_train.runs import launch
from bcos_train.runs.folder import CHECKPOINTS, CONFIG, RunFolder, find_run_folder, locked, run_hash
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.schedule import Schedule
from bcos_train.training import loggers
from bcos_train.training.build import build_model, build_trainer, choose_num_classes, print_banner
from bcos_train.training.callbacks import explanations as explanation_logging
from bcos_train.training.callbacks.checkpoint import Checkpointer, Checkpointing, UnknownMonitor, find_checkpoint
from bcos_train.training.callbacks.ema import Ema, EmaCallback, ema_decay
from bcos_train.training.callbacks.metrics import CsvLogger
from bcos_train.training.callbacks.progress import ProgressDisplay, TrainingLog
from bcos_train.training.compilation import should_compile
from bcos_train.training.finish import finish, report_evaluation
from bcos_train.training.image_size import check_image_size
from bcos_train.training.module import Classifier, NonFiniteLoss
from bcos_train.training.options import BatchSplit, TrainerOptions, default_workers, split_batch
from bcos_train.weights.model_options import model_of_config
from bcos_train.weights.source import read_model_weights
from bcos_train.weights.state_dict import load_weights

#: Exit code of a run that stopped because its loss was no longer finite.
DIVERGED = 3


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The top-level keys of ``configs/train.yaml``, built.

    Args:
        model: Builds the model; called with ``num_classes``.
        encoding: RGB in [0, 1] to the model's input.
        batch_size: Images of one optimizer step, over all devices.
        limit_train, limit_val: Take this many images, always the same ones; ``None``: all. For trials.
        num_workers: Loading processes of each process; ``None``: from the number of cores.
        seed: Of the initial weights, the order, the augmentation and the steps.
        name: Free text at the beginning of the run folder's name.
        runs: Folder of all runs.
        resume: Go on with the run that has the same config; otherwise take a new folder.
        plugins: Modules of the user that register models and targets; imported before the config is validated.
    """

    model: Callable[..., nn.Module]
    dataset: ImageSource
    augmentation: Augmentation
    encoding: BcosEncoding | Standardize
    loss: nn.Module
    eval_loss: nn.Module
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    trainer: TrainerOptions
    checkpointing: Checkpointing
    batch_size: int
    ema: Ema | None = None
    explanation: ExplanationOptions | None = None
    logger: dict[str, Callable[..., Logger]] | None = None
    limit_train: int | None = None
    limit_val: int | None = None
    num_workers: int | None = None
    seed: int = 42
    name: str = "default"
    runs: str = "runs"
    resume: bool = True
    plugins: Sequence[str] = ()


def train(config: Mapping[str, Any], folder: Path | None = None) -> int:
    """Train as a checked, plain config says; returns the exit code.

    Args:
        config: All keys of ``configs/train.yaml``.
        folder: Run folder to go on in; ``None``: the one that belongs to the config.

    Raises:
        UserError: Something in the config or the data that the user can put right.
    """
    _quieten()
    options: TrainerOptions = instantiate(config["trainer"], path="trainer")
    if not config["name"] or "/" in config["name"]:
        raise UserError(f"name={config['name']}: a word for the run folder's name, without /")
    world = launch.launched_world_size()
    if world is None and options.num_nodes > 1:
        raise UserError(f"trainer.num_nodes={options.num_nodes} needs a launcher: srun, torchrun or submitit")
    if world not in (None, options.world_size):
        raise UserError(
            f"the launcher started {world} processes, but trainer.devices x trainer.num_nodes is {options.world_size}"
        )
    with user_errors_at(""):
        split_batch(config["batch_size"], options.world_size, options.max_batch_per_device)
    if world is None and options.world_size > 1:
        return _restart(config, options.processes_per_node)
    parts = TrainConfig(**instantiate(config))
    stop = StopFlag()
    with stop.watching():
        try:
            with _mistakes_that_show_late():
                return launch.exit_with(_train(parts, config, stop, folder))
        except Interrupted as interrupted:
            return launch.exit_with(interrupted.exit_code)
        except (KeyboardInterrupt, SystemExit):
            if not stop.at_once:  # what Lightning makes of a KeyboardInterrupt is SystemExit(1)
                raise
            return launch.exit_with(128 + signal.SIGINT)
        except NonFiniteLoss as error:
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"stopped: {error}", style="red", highlight=False, markup=False)
            return launch.exit_with(DIVERGED)


@contextlib.contextmanager
def _mistakes_that_show_late() -> Iterator[None]:
    """What only reading the data or writing the results brings to light, as a :class:`UserError`."""
    try:
        yield
    except (UnevenImages, UnreadableImage) as error:
        # A loading process sends its whole traceback along; the message is in its last line.
        raise UserError(str(error).strip().splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]) from error
    except NotCacheable as error:
        raise UserError(f"dataset: {error}") from error
    except UnknownMonitor as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = "make room and give the same command again; the checkpoints are as they were"
        raise UserError(f"{error}: {text}") from error


def _restart(config: Mapping[str, Any], processes: int) -> int:
    """Run the same config in several processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save(config, path)
        plugins = config.get("plugins") or []
        arguments = [f"plugins=[{','.join(plugins)}]"] if plugins else []
        return launch.run_under_torchrun("bcos_train.run", path, processes, arguments)


def _train(parts: TrainConfig, config: Mapping[str, Any], stop: StopFlag, resumed: Path | None) -> int:
    console = Console(quiet=launch.rank() > 0)
    split = split_batch(parts.batch_size, parts.trainer.world_size, parts.trainer.max_batch_per_device)
    with user_errors_at(""):
        trainer = build_trainer(parts.trainer, split.accumulate)
    trainer.strategy.setup_environment()
    data = _load_data(parts, split, trainer)
    model = build_model(parts, data)
    check_image_size(model, data, parts.encoding, config)
    with user_errors_at(""):
        compiled = should_compile(parts.trainer, model)
    with user_errors_at("optimizer"):
        parts.optimizer([nn.Parameter(torch.zeros(1, 1))])  # a wrong number is told before anything is written
    base = Path(parts.runs, parts.dataset.name, config["model"]["name"], f"{parts.name}-{run_hash(config)}")
    found: RunFolder | None = None
    if trainer.is_global_zero:  # it reads every checkpoint through
        found = find_run_folder(base, parts.resume) if resumed is None else find_run_folder(resumed, resume=True)
    folder = trainer.strategy.broadcast(found)
    assert folder is not None
    for complaint in folder.complaints:
        console.print(f"passed over: {complaint}", style="yellow", highlight=False, soft_wrap=True)
    if folder.finished:
        text = f"finished already: {folder.path} (resume=false trains anew in another folder)"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return 0
    with contextlib.ExitStack() as stack:
        if trainer.is_global_zero:
            with user_errors_at(""):
                stack.enter_context(locked(folder.path))
            save(config, folder.path / CONFIG)
        module = _build_module(parts, model, data, data.steps_per_epoch, compiled=compiled)
        csv_logger = CsvLogger(folder.path)
        extra_loggers = _extra_loggers(parts, folder) if trainer.is_global_zero else []
        stack.callback(loggers.close, extra_loggers)
        with user_errors_at(""):
            loggers.start(extra_loggers, config)
        trainer.loggers = [csv_logger, *extra_loggers]
        title = f"{config['model']['name']} on {parts.dataset.name} · {folder.name}"
        trainer.callbacks += _build_callbacks(parts, data, title, folder, console, stop)  # type: ignore[attr-defined]
        print_banner(console, parts, config["model"]["name"], model, data, split, folder, module.compilation)
        if folder.resume_from is None:
            csv_logger.forget_after(-1)  # all steps will be taken again
        started = time.monotonic()
        trainer.fit(module, datamodule=data, ckpt_path=folder.resume_from)
        if trainer.is_global_zero:
            finish(trainer, module, folder, config, console, time.monotonic() - started)
    return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The top-level keys of ``configs/evaluate.yaml``, built.

    Args:
        run: Run folder whose config and checkpoint are taken.
        checkpoint: ``best``, ``last`` or a path.
        weights: Without ``run``: ``official``, or the path of a checkpoint, a ``.safetensors`` or ``.pth`` file or a
            folder with ``model.safetensors``.
        use_ema: Take the averaged weights; ``None``: if there are any.
        output: Folder for the results; ``None``: the run folder, or ``evaluations/<model>``.
    """

    run: str | None = None
    checkpoint: str = "best"
    weights: str | None = None
    use_ema: bool | None = None
    output: str | None = None


def evaluate(config: Mapping[str, Any], given: Sequence[str] = ()) -> int:
    """Evaluate as a checked, plain config says; returns the exit code.

    Args:
        config: All keys of ``configs/evaluate.yaml``.
        given: Those that the user set. With ``run``, all others come from that run.

    Raises:
        UserError: Nothing to evaluate, or something that the user can put right.
    """
    _quieten()
    folder = None if config["run"] is None else Path(config["run"])
    if folder is None and config["weights"] is None:
        raise UserError("nothing to evaluate: give run=<run folder>, or model=… dataset=… weights=official|<path>")
    if folder is not None:
        if config["weights"] is not None:
            raise UserError("give run=<run folder> or weights=<path>, not both")
        own = {key: config[key] for key in ("run", "checkpoint", "weights", "use_ema", "output")}
        # A recipe or a launcher is no key of the config.
        keys = [key for key in given if key.partition(".")[0] in config]
        saved = load_config(folder / CONFIG)
        config = explanation_logging.keep_choices_of_the_dataset(overlay(saved, config, keys) | own, saved, keys)
        if problems := check(config, root=EvaluateConfig):
            raise UserError("\n".join(f"{folder / CONFIG}: {problem}" for problem in problems))
    name = config["model"]["name"]
    # What training began with isn't fetched: it would be overwritten.
    fresh = {key: value for key, value in config["model"].items() if key not in ("pretrained", "weights")}
    parts = EvaluateConfig(**instantiate({**config, "model": fresh}))
    if launch.launched_world_size() is None:
        parts = replace(parts, trainer=replace(parts.trainer, devices=1, num_nodes=1))
    with user_errors_at(""):
        path = find_checkpoint(folder / CHECKPOINTS, parts.checkpoint) if folder else parts.weights
        assert path is not None
        source = read_model_weights(name, path, parts.use_ema)
        source.check_model(*model_of_config(fresh))
        trainer = build_trainer(parts.trainer)
        split = split_batch(parts.batch_size, parts.trainer.world_size, None)
    trainer.strategy.setup_environment()
    data = _load_data(parts, split, trainer, stage="validate")
    model = build_model(parts, data)
    with user_errors_at(""):
        load_weights(model, source.state, source.label)
    # The training part may be missing.
    module = _build_module(parts, model, data, steps_per_epoch=1)
    explanations = explanation_logging.ExplanationReport(trainer)
    started = time.monotonic()
    with _mistakes_that_show_late():
        check_image_size(model, data, parts.encoding, config, ["eval"])
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        output = Path(parts.output or folder or Path("evaluations", name))
        described = {"weights": str(path), "ema": source.is_ema, "model": name}
        report_evaluation(module, data, described, output, time.monotonic() - started)
        explanations.write(module, data, parts.explanation, described, config, output)
    return 0


def _load_data(parts: TrainConfig, split: BatchSplit, trainer: pl.Trainer, stage: str = "fit") -> DataModule:
    with user_errors_at("dataset"):
        data = DataModule(
            parts.dataset,
            train_transform=parts.augmentation.train,
            eval_transform=parts.augmentation.eval,
            batch_size=split.batch,
            num_workers=default_workers() if parts.num_workers is None else parts.num_workers,
            seed=parts.seed,
            repetitions=parts.augmentation.repetitions,
            accumulate=split.accumulate,
            pin_memory=parts.trainer.uses_cuda,
            limit_train=parts.limit_train,
            limit_val=parts.limit_val,
        )
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier("prepare_data")
        data.setup(stage)
    return data


def _build_module(
    parts: TrainConfig, model: nn.Module, data: DataModule, steps_per_epoch: int, compiled: bool = False
) -> Classifier:
    augmentation, options = parts.augmentation, parts.trainer
    with user_errors_at("augmentation"):
        mix = BatchMix(choose_num_classes(parts, data), augmentation.mixup_alpha, augmentation.cutmix_alpha)
    return Classifier(
        model,
        loss=parts.loss,
        eval_loss=parts.eval_loss,
        # The scaler of 16 bits and clipping need the gradients as they are.
        optimizer=parts.optimizer if str(options.precision) == "16" else prefer_fused(parts.optimizer),
        schedule=parts.schedule,
        steps_per_epoch=steps_per_epoch,
        encoding=parts.encoding,
        mix=mix,
        gradient_clip_val=options.gradient_clip_val,
        gradient_clip_algorithm=options.gradient_clip_algorithm,
        channels_last=options.uses_channels_last,
        compiled=compiled,
        log_every_n_steps=options.log_every_n_steps,
        seed=parts.seed,
    )


def _extra_loggers(parts: TrainConfig, folder: RunFolder) -> list[Logger]:
    try:
        return [make(folder=folder.path, run_id=folder.name) for make in (parts.logger or {}).values()]
    except ModuleNotFoundError as error:
        raise UserError(f"logger: {' '.join(str(error).split())}") from error


def _build_callbacks(
    parts: TrainConfig, data: DataModule, title: str, folder: RunFolder, console: Console, stop: StopFlag
) -> list[pl.Callback]:
    """In the order in which their hooks run: measure, average, explain, show, save."""
    callbacks: list[pl.Callback] = [TrainingLog()]
    if parts.ema is not None:
        every, epochs = parts.ema.every_n_steps, parts.trainer.max_epochs
        warmup_steps = round(parts.schedule.warmup(data.steps_per_epoch) * data.steps_per_epoch)
        callbacks.append(EmaCallback(ema_decay(parts.ema.decay, data.batch_size, every, epochs), every, warmup_steps))
    if parts.explanation is not None:
        callback = explanation_logging.ExplanationCallback(parts.explanation, folder.path / "explanations", title)
        callbacks.append(callback)
    if parts.trainer.progress:
        callbacks.append(ProgressDisplay(console))
    return [*callbacks, Checkpointer(folder.checkpoints, parts.checkpointing, stop)]


def _quieten() -> None:
    """Silence what Lightning says that the banner says better, or that doesn't apply here."""
    for package in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for message in (
        ".*sync_dist=True.*",  # what is logged on rank 0 alone has been summed over the processes before
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*your dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def main() -> int:
    """Train as a saved config says, in its run folder if it lies in one: ``python -m bcos_train.run config.yaml``.

    Plugins that the config names must be named again: ``python -m bcos_train.run config.yaml plugins=[my_package]``.
    """
    launch.report_pid()
    try:
        plugins = plugins_in_overrides(sys.argv[2:])
        if len(sys.argv) != (3 if plugins else 2):
            raise UserError("usage: python -m bcos_train.run <config.yaml> [plugins=[my_package]]")
        load_plugins(plugins)
        path = Path(sys.argv[1])
        config = load_config(path)
        if problems := check(config, root=TrainConfig):
            raise UserError("\n".join(map(str, problems)))
        return train(config, path.parent if (path.parent / CHECKPOINTS).is_dir() else None)
    except UserError as error:
        if launch.rank() == 0:
            print(error, file=sys.stderr)
        return launch.exit_with(2)


if __name__ == "__main__":
    sys.exit(main())
