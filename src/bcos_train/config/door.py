"""The way from a command line to a checked config: one short message for a mistake, no traceback."""

import functools
import inspect
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bcos_train.config.check import Problem, check
from bcos_train.config.compose import VERSION_BASE, Composer, finish, one_line, texts
from bcos_train.config.errors import UserError
from bcos_train.config.overrides import check_choices, read_overrides
from bcos_train.suggest import suggest

__all__ = ["door", "given_keys"]

Task = Callable[[dict[str, Any]], int | None]

#: Exit codes: a mistake of the user's, and an interrupt as shells report it (128 + SIGINT).
MISTAKE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
#: Codes from here on are 128 + a signal's number.
SIGNALLED = 128
#: Of a larger sweep the other jobs are checked as they start; composing one takes 0.1 s.
MAX_PREFLIGHT = 1000
#: The variable by which Hydra's users ask for tracebacks.
FULL_ERROR = "HYDRA_FULL_ERROR"


class JobFailed(Exception):
    """A job in another process ended with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class SweepStopped(BaseException):
    """A job of a sweep was told to stop: the jobs after it are not to start. Hydra goes on at an ``Exception``."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def door(
    *, config_name: str, root: Callable[..., Any], config_dir: str | os.PathLike[str] | None = None
) -> Callable[[Task], Callable[[], None]]:
    """Make ``main(config) -> exit code`` a command with Hydra's command line.

    The config is composed and checked before ``main`` starts; in a sweep (``-m``), that of every job before the first
    starts. A mistake gives exit code 2 and a line on stderr for each problem; ``HYDRA_FULL_ERROR=1`` shows the
    traceback as well. Errors that are not a user's keep theirs.

    Args:
        config_name: Main config.
        root: The function whose parameters are the config's top-level keys.
        config_dir: Folder of the configs; ``configs`` beside the file of ``main`` by default.

    The decorated function gets the config as plain containers, with everything resolved.
    """

    def decorate(main: Task) -> Callable[[], None]:
        script_dir = Path(inspect.getfile(main)).resolve().parent
        folder = Path(config_dir) if config_dir is not None else script_dir / "configs"

        @functools.wraps(main)
        def entry() -> None:
            try:
                code = _enter(main, config_name, root, folder, script_dir)
            except KeyboardInterrupt:
                code = INTERRUPTED
            except BrokenPipeError:  # `--help | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = PIPE_CLOSED
            except (UserError, HydraException, OmegaConfBaseException) as error:
                _report(error)
                code = MISTAKE
            if code:
                sys.exit(code)

        return entry

    return decorate


def given_keys() -> list[str]:
    """The keys and config groups that the running job's command line sets, as typed there."""
    return [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in texts(HydraConfig.get().overrides.task)]


def _enter(main: Task, config_name: str, root: Callable[..., Any], config_dir: Path, script_dir: Path) -> int:
    arguments = _parse_flags()
    if arguments.config_path is not None:
        config_dir = script_dir / arguments.config_path
    replaced: dict[str, str] = {}
    if not (arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion):
        composer = Composer(config_dir, arguments.config_dir)
        replaced = _preflight(composer, arguments, config_name, root)
    outcome = _Outcome()
    task = _make_task(main, root, outcome, full_error=os.environ.get(FULL_ERROR))
    run = hydra.main(version_base=VERSION_BASE, config_path=str(config_dir), config_name=config_name)(task)
    argv = sys.argv
    sys.argv = [argv[0], *(replaced.get(argument, argument) for argument in argv[1:])]
    try:
        # Hydra then raises its errors instead of printing them and leaving with exit code 1.
        with _environment(FULL_ERROR, "1"):
            run()
    except (JobFailed, SweepStopped) as stopped:
        return stopped.code
    except ValueError as error:  # flags that don't go together; nothing of ours ends here
        raise UserError(one_line(error)) from error
    finally:
        sys.argv = argv
    if outcome.error is not None:
        raise outcome.error
    return outcome.code


def _parse_flags() -> Namespace:
    """Hydra's flags and the overrides, with its complaints in our form."""
    parser = get_args_parser()

    def complain(message: str) -> NoReturn:
        kind, _, rest = message.partition("unrecognized arguments: ")
        if kind:
            raise UserError(message)
        flag = rest.split()[0]
        setting = flag.lstrip("-") + ("" if "=" in flag else "=…")
        raise UserError(f"{flag}: no such option; settings are written without dashes: {setting}")

    parser.error = complain  # type: ignore[method-assign]
    arguments = parser.parse_args()
    if arguments.experimental_rerun is not None:
        raise UserError("--experimental-rerun: not supported, because it unpickles a file")
    return arguments


def _preflight(composer: Composer, arguments: Namespace, config_name: str, root: Callable[..., Any]) -> dict[str, str]:
    """Compose and check every job; returns what to hand to Hydra in place of each setting.

    Raises:
        UserError: All problems of all jobs, one a line.
    """
    name = config_name if arguments.config_name is None else arguments.config_name
    if name.removesuffix(".yaml") not in (choices := composer.main_configs):
        raise UserError(f"--config-name {name}: no such config{suggest(name, choices)} (choices: {', '.join(choices)})")
    top_level = inspect.signature(root).parameters
    replaced, problems = read_overrides(arguments.overrides, composer, top_level, lambda: _defaults(composer, name))
    _raise(problems)
    overrides = [replaced[text] for text in arguments.overrides]
    _raise(check_choices(overrides, composer, may_sweep=True))
    is_sweep = arguments.multirun or composer.is_sweep(name, overrides)
    found: list[Problem] = []
    for job in composer.jobs(name, overrides)[:MAX_PREFLIGHT] if is_sweep else [overrides]:
        problems = check_choices(job, composer)
        if not problems:
            config = composer.compose(name, job)
            # --cfg is for finding out what is wrong.
            problems = [] if arguments.cfg else check(config, root=root)
        found += problems
    _raise(found)
    return replaced


def _defaults(composer: Composer, name: str) -> dict[str, Any]:
    """The config without overrides, or nothing if it doesn't stand on its own."""
    try:
        return composer.compose(name)
    except UserError:
        return {}


@dataclass
class _Outcome:
    """What came of the jobs in this process."""

    code: int = 0
    error: Exception | None = None


def _make_task(
    main: Task, root: Callable[..., Any], outcome: _Outcome, full_error: str | None
) -> Callable[[DictConfig], None]:
    """What Hydra runs for each job, here or, by a launcher, in another process."""
    home = os.getpid()

    @functools.wraps(main)
    def task(config: DictConfig) -> None:
        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        with _environment(FULL_ERROR, full_error):
            try:
                plain = finish(config)
                _raise(check(plain, root=root))
                code = main(plain) or 0
            except UserError as error:
                _report(error)
                code = MISTAKE
            except Exception as error:
                if not is_sweep:
                    outcome.error = error
                    return
                # The other jobs go on.
                traceback.print_exc()
                code = 1
        if code and os.getpid() != home:
            raise JobFailed(code)
        if is_sweep and code >= SIGNALLED:
            raise SweepStopped(code)
        outcome.code = max(outcome.code, code)

    return task


def _raise(problems: Iterable[Problem]) -> None:
    if lines := list(dict.fromkeys(map(str, problems))):
        raise UserError("\n".join(lines))


def _report(error: Exception) -> None:
    """The message alone, on stderr."""
    if os.environ.get(FULL_ERROR) == "1":
        traceback.print_exception(error)
    print(error if isinstance(error, UserError) else one_line(error), file=sys.stderr)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable set, or unset by None, within the block."""
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
