"""``train`` and ``evaluate``: from a validated config to a run folder or an evaluation."""

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from bcos_train.config import Problem, UserError, check, instantiate, load_plugins, overlay, save, user_errors_at
from bcos_train.config import load as load_config
from bcos_train.config.composition import Override
from bcos_train.config.containers import Config
from bcos_train.config.overrides import plugins_in_overrides
from bcos_train.dataset.classes import with_model_classes
from bcos_train.runs import launch
from bcos_train.runs.checkpoint import Check, set_aside
from bcos_train.runs.folder import Resume, RunFolder, find_checkpoint, is_finished, read_run_folder
from bcos_train.runs.hash import run_hash, with_absolute_paths
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.launcher import launched, rank
from bcos_train.runs.layout import CHECKPOINT_SUFFIX, CHECKPOINTS, RUN_CONFIG
from bcos_train.runs.lock import locked
from bcos_train.training import loggers
from bcos_train.training.banner import print_banner
from bcos_train.training.build import (
    build_callbacks,
    build_loggers,
    build_model,
    build_module,
    build_task,
    build_trainer,
    check_monitor,
    check_optimizer,
    keep_initial_classes,
    load_data,
)
from bcos_train.training.callbacks.explanations import ExplanationReport, Origin
from bcos_train.training.callbacks.metrics import CsvLogger
from bcos_train.training.compilation import should_compile
from bcos_train.training.config import (
    CommonConfig,
    EvaluateConfig,
    PrecomputeConfig,
    TrainConfig,
    find_moved_dataset,
    restore_dataset_settings,
)
from bcos_train.training.distributed import from_rank_zero
from bcos_train.training.environment import check_launcher
from bcos_train.training.finish import finish, report_evaluation
from bcos_train.training.image_size import check_image_size, check_smallest_batch
from bcos_train.training.label_checks import check_labels
from bcos_train.training.messages import as_user_errors, silence_lightning
from bcos_train.training.module import Classifier, NonFiniteLoss
from bcos_train.training.options import split_batch
from bcos_train.training.peers import PeerFailed, joined
from bcos_train.training.precompute import precompute
from bcos_train.training.resuming import check_resumable
from bcos_train.training.side_matters import protect
from bcos_train.utils.atomic import remove_leftovers, unused_path
from bcos_train.utils.console import make_console
from bcos_train.utils.terminal import print_line
from bcos_train.weights.build import warn_of_assumed_bias
from bcos_train.weights.model_options import model_of_config
from bcos_train.weights.source import read_model_weights
from bcos_train.weights.state_dict import load_weights

#: Keys of ``configs/evaluate.yaml`` that a run's config lacks.
EVALUATION_KEYS = ("run", "checkpoint", "weights", "use_ema", "output")


def train(config: Config, folder: Path | None = None) -> int:
    """Train with a validated config and return the exit code.

    Args:
        config: All keys of ``configs/train.yaml``.
        folder: Run folder to resume in; ``None``: the one that corresponds to the config.

    Raises:
        UserError: The config or the data is invalid.
    """
    silence_lightning()
    config = with_absolute_paths(config)  # the run can then be resumed from any folder
    settings = TrainConfig(**instantiate(config))
    options = settings.trainer
    if not settings.name or "/" in settings.name:
        raise UserError(f"name={settings.name}: expected a prefix for the run folder's name, without /")
    place = check_launcher(options)
    with user_errors_at(""):
        split_batch(settings.batch_size, options.world_size, options.max_batch_per_device)
    check_monitor(settings)
    check_labels(settings)
    check_optimizer(settings.optimizer)
    if place is None and options.world_size > 1:
        return _restart(config, folder, settings.plugins, options.processes_per_node)
    stop = StopFlag()
    with stop.handling_signals():
        try:
            with joined(place, stop), as_user_errors():
                return launch.report_exit_code(_train(settings, config, stop, folder))
        except (Interrupted, PeerFailed) as end:
            return launch.report_exit_code(end.exit_code)
        except (KeyboardInterrupt, SystemExit):
            if not stop.immediate:  # Lightning turns a KeyboardInterrupt into SystemExit(1)
                raise
            return launch.report_exit_code(128 + signal.SIGINT)
        except NonFiniteLoss as error:
            if not error.is_elsewhere:
                make_console(stderr=True).print(f"stopped: {error}", style="red", soft_wrap=True)
            return launch.report_exit_code(error.exit_code)


def _restart(config: Config, folder: Path | None, plugins: Sequence[str], processes: int) -> int:
    """Train with the same config, in the same folder, in several processes."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / RUN_CONFIG
        save(config, path)
        arguments = [f"plugins=[{','.join(plugins)}]"] if plugins else []
        if folder is not None:
            arguments.append(f"folder={folder}")
        return launch.run_under_torchrun("bcos_train.run", path, processes, arguments)


def _train(settings: TrainConfig, config: Config, stop: StopFlag, resumed: Path | None) -> int:
    console = make_console(quiet=rank() > 0)
    split = split_batch(settings.batch_size, settings.trainer.world_size, settings.trainer.max_batch_per_device)
    with user_errors_at(""):
        trainer = build_trainer(settings.trainer, split.accumulate)
    trainer.strategy.setup_environment()
    base = resumed or Path(
        settings.runs, settings.dataset.name, settings.model_name, f"{settings.name}-{run_hash(config)}"
    )
    resume = settings.resume or resumed is not None  # a folder that is given is the one to resume in
    if resume and from_rank_zero(trainer, lambda: is_finished(base)):
        return _report_finished(console, base)
    data = load_data(settings, split, trainer, keep_initial_classes(settings))
    model = build_model(settings, data)
    check_image_size(model, data, settings.encoding, config)  # before tasks use the model
    task = build_task(settings, model, data)
    check_smallest_batch(model, data, settings.encoding, settings.trainer.world_size)
    with user_errors_at(""):
        compiled_batch_size = split.per_device if should_compile(settings.trainer, model) else None
    check_checkpoint = partial(
        check_resumable,
        model=model,
        build_optimizer=settings.optimizer,
        data=data,
        task=task,
        has_ema=settings.ema is not None,
        data_changed=settings.resume == "data_changed",
    )
    with contextlib.ExitStack() as stack:
        folder = from_rank_zero(trainer, lambda: _open_folder(stack, base, resume, config, check_checkpoint))
        for warning in folder.warnings:
            console.print(f"skipped: {warning}", style="yellow", soft_wrap=True)
        if folder.finished:  # in the meantime, by another process
            return _report_finished(console, folder.path)
        module = build_module(settings, model, data, task, compiled_batch_size)
        csv_logger = CsvLogger(folder.path)
        extra_loggers = build_loggers(settings, folder) if trainer.is_global_zero else []
        stack.callback(loggers.close, extra_loggers)
        with user_errors_at(""):
            loggers.start(extra_loggers, config)
        trainer.loggers = [csv_logger, *map(protect, extra_loggers)]
        title = f"{settings.model_name} on {settings.dataset.name} · {folder.name}"
        trainer.callbacks += build_callbacks(settings, data, task, title, folder, console, stop)  # type: ignore[attr-defined]
        print_banner(console, settings, model, data, split, folder, module.compilation, task)
        if folder.resume_from is None:
            csv_logger.drop_after(-1)  # training restarts at the first step
        started = time.monotonic()
        trainer.fit(module, datamodule=data, ckpt_path=folder.resume_from)
        if trainer.is_global_zero:
            finish(trainer, module, folder, settings.model_name, console, time.monotonic() - started)
    return 0


def _report_finished(console: Console, path: Path) -> int:
    console.print(f"already finished: {path} (resume=false trains again in another folder)", soft_wrap=True)
    return 0


def _open_folder(
    stack: contextlib.ExitStack, base: Path, resume: Resume, config: Config, check_checkpoint: Check
) -> RunFolder:
    """Lock the run folder until the end of ``stack``, then read its state and prepare it."""
    path = base if resume else unused_path(base)
    stack.enter_context(locked(path))
    folder = read_run_folder(path, adopt=resume == "adopt", check=check_checkpoint)
    if not folder.finished:
        for foreign in folder.foreign:  # before a new one replaces it
            set_aside(foreign)
        remove_leftovers(path)
        save(config, path / RUN_CONFIG)
    return folder


def evaluate(config: Config, overridden: Sequence[str] = ()) -> int:
    """Evaluate with a validated config and return the exit code.

    Args:
        config: All keys of ``configs/evaluate.yaml``.
        overridden: Keys overridden on the command line. With ``run``, all others are those of the run.

    Raises:
        UserError: There is nothing to evaluate, or the config or the data is invalid.
    """
    silence_lightning()
    folder = None if config["run"] is None else Path(config["run"])
    if folder is None and config["weights"] is None:
        raise UserError("nothing to evaluate: give run=<run folder>, or model=… dataset=… weights=official|<path>")
    if folder is not None:
        if config["weights"] is not None:
            raise UserError("give run=<run folder> or weights=<path>, not both")
        config = rebase_on_run(config, overridden)
        if problems := check(config, root=EvaluateConfig):
            raise UserError("\n".join(f"{folder / RUN_CONFIG}: {problem}" for problem in problems))
    # Initial weights of the training aren't downloaded: they would be overwritten.
    model_config = {key: value for key, value in config["model"].items() if key not in ("pretrained", "weights")}
    # Optimizer, loss and schedule of the training are not built.
    settings = CommonConfig(**instantiate(CommonConfig.select({**config, "model": model_config})))
    with user_errors_at(""):
        if launched() is None:
            settings = replace(settings, trainer=replace(settings.trainer, devices=1, num_nodes=1))
    try:
        with joined(check_launcher(settings.trainer)), as_user_errors():
            _evaluate(settings, config, folder, model_config)
    except PeerFailed as end:
        return end.exit_code
    return 0


def _evaluate(settings: CommonConfig, config: Config, folder: Path | None, model_config: Config) -> None:
    with user_errors_at(""):
        path = find_checkpoint(folder / CHECKPOINTS, config["checkpoint"]) if folder else config["weights"]
        assert path is not None
        source = read_model_weights(settings.model_name, path, config["use_ema"])
        source.check_model(*model_of_config(model_config))
        trainer = build_trainer(settings.trainer)
        split = split_batch(settings.batch_size, settings.trainer.world_size, None)
    check_labels(settings)
    trainer.strategy.setup_environment()
    if trainer.is_global_zero and (root := getattr(settings.dataset, "root", None)) is not None:
        make_console().print(f"data set: {root}", soft_wrap=True)
    match_classes = partial(with_model_classes, class_names=source.class_names, label=source.label)
    data = load_data(settings, split, trainer, match_classes, stage="validate")
    model = build_model(settings, data)
    with user_errors_at(""):
        load_weights(model, source.state, source.label)
        warn_of_assumed_bias(model, source, *model_of_config(model_config))
    module = Classifier(
        model,
        encoding=settings.encoding,
        eval_loss=settings.eval_loss,
        channels_last=settings.trainer.uses_channels_last,
        is_multi_label=data.is_multi_label,
        group_names=data.group_names,
    )
    explanations, started = ExplanationReport(trainer), time.monotonic()
    check_image_size(model, data, settings.encoding, config, ["eval"])
    trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        output = Path(config["output"] or folder or Path("evaluations", settings.model_name))
        origin: Origin = {"weights": str(path), "ema": source.is_ema, "model": settings.model_name}
        remove_leftovers(output)  # of an evaluation that was killed
        report_evaluation(module, data, origin, output, time.monotonic() - started)
        explanations.write(module, data, settings.explanation, origin, config, output)


def precompute_teacher(config: Config) -> int:
    """Compute a teacher's logits and maps with a validated config and return the exit code.

    Args:
        config: All keys of ``configs/precompute_teacher.yaml``.

    Raises:
        UserError: The config or the data is invalid.
    """
    silence_lightning()
    with as_user_errors():
        precompute(PrecomputeConfig(**instantiate(with_absolute_paths(config))), make_console())
    return 0


def check_beside_run(overrides: Sequence[Override]) -> list[Problem]:
    """Return the problems of a command line with ``run=…``: overrides that would have no effect, and deletions.

    The config is the run's, so a recipe or a key of the training can't change it any more.
    """
    if all(override.key_or_group != "run" or override.is_delete() for override in overrides):
        return []
    used = {*(field.name for field in fields(CommonConfig)), *EVALUATION_KEYS}
    problems = []
    for override in overrides:
        key = override.key_or_group
        if key.startswith(("hydra/", "hydra.")):
            continue
        if override.is_delete():
            problems.append(Problem(f"~{key}", "nothing can be deleted beside run=…; set a value, such as null"))
        elif key.partition(".")[0] not in used:
            text = "has no effect beside run=…, whose settings apply; set single keys of the evaluation"
            problems.append(Problem(key, text, override.get_value_element_as_str()))
    return problems


def rebase_on_run(config: Config, overridden: Sequence[str] = ()) -> Config:
    """Return the config of the run that ``config`` names, if any, with the keys of the command line.

    The data set's folder is that of ``dataset.root`` on the command line, else that of ``DATA_ROOT`` or
    ``IMAGENET_PATH``, else the run's.

    Args:
        config: Composed from ``configs/evaluate.yaml``.
        overridden: Keys overridden on the command line.

    Raises:
        UserError: ``run`` is not a run folder, or a key is below one that has no keys in the run.
    """
    if config["run"] is None:
        return dict(config)
    folder = Path(config["run"])
    if folder.is_file():
        run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
        checkpoint = f" checkpoint={folder}" if folder.suffix == CHECKPOINT_SUFFIX else ""
        raise UserError(f"run={folder}: a file, expected the run folder: run={run}{checkpoint}")
    if not (folder / RUN_CONFIG).is_file():
        parent = f"; did you mean run={folder.parent}?" if (folder.parent / RUN_CONFIG).is_file() else ""
        problem = f"not a run folder, since it has no {RUN_CONFIG}" if folder.is_dir() else "no such folder"
        raise UserError(f"run={folder}: {problem}{parent}")
    run_config = load_config(folder / RUN_CONFIG)
    for key in ("model", "dataset"):
        if not isinstance(run_config.get(key), dict):
            raise UserError(f"{folder / RUN_CONFIG}: not the config of a run, since it has no {key}")
    # Launchers are no keys of the config.
    keys = [key for key in overridden if key.partition(".")[0] in config]
    evaluation = {key: config[key] for key in EVALUATION_KEYS}
    rebased = restore_dataset_settings(overlay(run_config, config, keys) | evaluation, run_config, keys)
    if not {"dataset", "dataset.root"} & set(overridden):
        rebased["dataset"] = find_moved_dataset(rebased["dataset"])
    return rebased


def main() -> int:
    """Train with a saved config, in its run folder if it is in one: ``python -m bcos_train.run config.yaml``.

    Plugins in the config must be repeated: ``python -m bcos_train.run config.yaml plugins=[my_package]``. A run folder
    elsewhere is given by ``folder=<path>``.
    """
    launch.report_pid()
    try:
        arguments = sys.argv[2:]
        plugins = plugins_in_overrides(arguments)
        folders = [Path(argument.removeprefix("folder=")) for argument in arguments if argument.startswith("folder=")]
        if len(sys.argv) < 2 or len(arguments) != bool(plugins) + len(folders) or len(folders) > 1:
            raise UserError(
                "usage: python -m bcos_train.run <config.yaml> [plugins=[my_package]] [folder=<run folder>]"
            )
        load_plugins(plugins)
        path = Path(sys.argv[1])
        config = load_config(path)
        if problems := check(config, root=TrainConfig):
            raise UserError("\n".join(map(str, problems)))
        if not folders and (path.parent / CHECKPOINTS).is_dir():
            folders = [path.parent]
        return train(config, folders[0] if folders else None)
    except UserError as error:
        if rank() == 0:
            print_line(error)
        return launch.report_exit_code(2)


if __name__ == "__main__":
    sys.exit(main())
