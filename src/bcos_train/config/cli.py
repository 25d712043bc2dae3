"""Entry points: from a command line to a validated config, with one line per mistake and no traceback."""

import functools
import inspect
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from bcos_train.config.composition import (
    COMPOSITION_ERRORS,
    FULL_ERROR,
    Composer,
    Override,
    is_sweep_job,
    job_overrides,
    one_line,
    parse_command_line,
    project_config_dir,
    run_jobs,
    to_job_config,
)
from bcos_train.config.containers import Config
from bcos_train.config.errors import UserError
from bcos_train.config.overrides import check_choices, check_values, plugins_in_overrides, read_overrides
from bcos_train.config.plugins import KEY as PLUGINS
from bcos_train.config.plugins import load_plugins
from bcos_train.config.validation import Problem, check
from bcos_train.runs.launcher import follows_rank_zero
from bcos_train.utils.suggestions import suggest
from bcos_train.utils.terminal import print_line

__all__ = ["entry_point", "overridden_keys"]

Task = Callable[[dict[str, object]], int | None]
#: Composed config and keys on the command line -> config to validate.
Rebase = Callable[[Config, Sequence[str]], Config]
#: Parsed overrides -> problems.
CheckOverrides = Callable[[Sequence[Override]], list[Problem]]

#: Exit codes: user error; interrupt and closed pipe as shells report them (128 + signal).
MISTAKE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
#: Exit codes from here on are 128 + a signal's number.
SIGNALLED = 128
#: Later jobs of a larger sweep are validated when they start; composing one takes 0.1 s.
MAX_PREFLIGHT = 1000


class JobFailed(Exception):
    """Raised by a job in another process that ends with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class SweepStopped(BaseException):
    """A signal stopped a job of a sweep: don't start the next ones. Hydra would continue after an ``Exception``."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def entry_point(
    *,
    config_name: str,
    root: Callable[..., object],
    config_dir: str | os.PathLike[str] | None = None,
    check_overrides: CheckOverrides = lambda _: [],
    rebase: Rebase = lambda config, _: dict(config),
) -> Callable[[Task], Callable[[], None]]:
    """Turn ``main(config) -> exit code`` into a command with Hydra's command line.

    The config is composed and validated before ``main`` starts; in a sweep (``-m``), the configs of all jobs are
    validated before the first one starts. A user error leads to exit code 2 and one line on stderr per problem, with a
    traceback only if ``HYDRA_FULL_ERROR=1``. Other errors keep their traceback.

    Args:
        config_name: Main config.
        root: Callable whose parameters are the top-level keys of the config.
        config_dir: Folder of the configs; :func:`project_config_dir` by default.
        check_overrides: Returns the problems of the command line that are known before a config is composed.
        rebase: Returns the config that is validated in place of the composed one, such as that of a saved run with the
            keys of the command line. ``main`` receives the composed one.

    The decorated function receives plain containers with all interpolations resolved.
    """

    def decorate(main: Task) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            try:
                folder = project_config_dir() if config_dir is None else Path(config_dir)
                code = _run(main, config_name, root, folder, check_overrides, rebase)
            except KeyboardInterrupt:
                code = INTERRUPTED
            except BrokenPipeError:  # `--help | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = PIPE_CLOSED
            except (UserError, *COMPOSITION_ERRORS) as error:
                _report(error)
                code = MISTAKE
            if code:
                sys.exit(code)

        return command

    return decorate


def overridden_keys() -> list[str]:
    """Return the keys and config groups that the command line of the current job sets, as typed."""
    return _keys(job_overrides())


def _keys(overrides: Iterable[str]) -> list[str]:
    return [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in overrides]


def _run(
    main: Task,
    config_name: str,
    root: Callable[..., object],
    config_dir: Path,
    check_overrides: CheckOverrides,
    rebase: Rebase,
) -> int:
    arguments = parse_command_line()
    trusted_dir = config_dir
    if arguments.config_path is not None:
        config_dir = Path(arguments.config_path).absolute()
    # First, since a plugin's models are choices of a config group.
    load_plugins(plugins_in_overrides(arguments.overrides))
    rewritten: dict[str, str] = {}
    if not (arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion):
        composer = Composer(config_dir, arguments.config_dir, trusted_dir)
        rewritten = _preflight(composer, arguments, config_name, root, check_overrides, rebase)
    outcome = _Outcome()
    extra_dir = None if arguments.config_dir is None else Path(arguments.config_dir).absolute()
    task = _make_task(main, root, rebase, outcome, full_error=os.environ.get(FULL_ERROR))
    argv = sys.argv
    sys.argv = [argv[0], *(rewritten.get(argument, argument) for argument in argv[1:])]
    if arguments.config_path is not None:
        # Hydra uses the last one. A relative path would be relative to the module of ``main``.
        sys.argv += ["--config-path", str(config_dir)]
    try:
        # With this variable Hydra raises its errors instead of printing them and exiting with code 1.
        with _environment(FULL_ERROR, "1"):
            run_jobs(task, config_dir, config_name, extra_dir, trusted_dir)
    except (JobFailed, SweepStopped) as stopped:
        return stopped.code
    finally:
        sys.argv = argv
    if outcome.error is not None:
        raise outcome.error
    return outcome.code


def _preflight(
    composer: Composer,
    arguments: Namespace,
    config_name: str,
    root: Callable[..., object],
    check_overrides: CheckOverrides,
    rebase: Rebase,
) -> dict[str, str]:
    """Compose and validate every job; returns what to pass to Hydra in place of each override.

    Raises:
        UserError: All problems of all jobs, one per line.
    """
    name = config_name if arguments.config_name is None else arguments.config_name
    if name.removesuffix(".yaml") not in (choices := composer.main_configs):
        raise UserError(f"--config-name {name}: no such config{suggest(name, choices)} (choices: {', '.join(choices)})")
    top_level = inspect.signature(root).parameters
    defaults = functools.cache(lambda: _defaults(composer, name))
    rewritten, problems = read_overrides(arguments.overrides, composer, top_level, defaults)
    _raise(problems)
    overrides = [rewritten[text] for text in arguments.overrides]
    parsed = [composer.parse(text) for text in overrides]
    for override in parsed:
        key = override.key_or_group
        if override.is_delete() and key in top_level and top_level[key].default is inspect.Parameter.empty:
            raise UserError(f"{override.input_line}: {key} can't be removed; choose another with {key}=…")
    _raise(check_choices(overrides, composer, defaults))
    _raise(check_overrides(parsed))

    def is_valid(job: list[str], key: str) -> bool:
        try:
            problems = check(rebase(composer.compose(name, job), _keys(job)), root=root)
        except UserError:
            return False
        return not any(f"{problem.path}.".startswith(f"{key}.") for problem in problems)

    is_sweep = arguments.multirun or composer.is_sweep(name, overrides)
    all_problems: list[Problem] = []
    for job in composer.jobs(name, overrides)[:MAX_PREFLIGHT] if is_sweep else [overrides]:
        problems = check_choices(job, composer, defaults) or check_values(job, composer, defaults, is_valid)
        if not problems:
            config = composer.compose(name, job)
            _load_plugins(config, job)
            # --cfg prints invalid configs too, for debugging.
            problems = [] if arguments.cfg else check(rebase(config, _keys(job)), root=root)
        all_problems += problems
    _raise(all_problems)
    return rewritten


def _load_plugins(config: Config, overrides: Sequence[str]) -> None:
    """Import the plugins of a composed config if the command line names them.

    Raises:
        UserError: A plugin is named only in a file, or it cannot be imported.
    """
    names = config.get(PLUGINS) or []
    if not isinstance(names, list) or not names:
        return  # ``check`` reports other types
    if refused := [name for name in names if name not in plugins_in_overrides(overrides)]:
        listed = f"{PLUGINS}=[{','.join(map(str, names))}]"
        raise UserError(
            f"{PLUGINS}={refused[0]}: a plugin runs code, so a file can't load it; if you trust it, add {listed}"
        )
    load_plugins(names)


def _defaults(composer: Composer, name: str) -> dict[str, object]:
    """Compose the config without overrides; empty if it is incomplete without them."""
    try:
        return composer.defaults(name)
    except UserError:
        return {}


@dataclass
class _Outcome:
    """Exit code and error of the jobs in this process."""

    code: int = 0
    error: Exception | None = None


def _make_task(
    main: Task,
    root: Callable[..., object],
    rebase: Rebase,
    outcome: _Outcome,
    full_error: str | None,
) -> Callable[[DictConfig], None]:
    """Return the function that Hydra calls for each job, in this process or, through a launcher, in another."""
    parent_pid = os.getpid()

    @functools.wraps(main)
    def task(config: DictConfig) -> None:
        is_sweep = is_sweep_job()
        with _environment(FULL_ERROR, full_error):
            try:
                job = to_job_config(config)
                _load_plugins(job, job_overrides())  # in another process, or beyond MAX_PREFLIGHT
                _raise(check(rebase(job, overridden_keys()), root=root))
                code = main(job) or 0
            except UserError as error:
                _report(error)
                code = MISTAKE
            except Exception as error:
                if not is_sweep:
                    outcome.error = error
                    return
                # The other jobs of the sweep still run.
                traceback.print_exc()
                code = 1
        if code and os.getpid() != parent_pid:
            raise JobFailed(code)
        if is_sweep and code >= SIGNALLED:
            raise SweepStopped(code)
        outcome.code = max(outcome.code, code)

    return task


def _raise(problems: Iterable[Problem]) -> None:
    if lines := list(dict.fromkeys(map(str, problems))):
        raise UserError("\n".join(lines))


def _report(error: Exception) -> None:
    """Print the message on stderr, and the traceback if ``HYDRA_FULL_ERROR=1``; of several processes, in rank 0."""
    if follows_rank_zero():
        return  # the same mistake, or printed already
    if os.environ.get(FULL_ERROR) == "1":
        traceback.print_exception(error)
    print_line(error if isinstance(error, UserError) else one_line(error))


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or unset it with ``None``, within the block."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
