"""Trials of a campaign: commands in forked processes, with a fault at a chosen moment.

Importing torch and the first steps take seconds. So one process does both, and forks for each trial.
"""

import contextlib
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bcos_train.runs.launch import SIGNALS

#: Seconds after which a trial is ended.
TIMEOUT = 240
#: Exit codes of a trial that took longer, and of one that could not begin.
TIMED_OUT, NOT_BEGUN = 98, 99
#: Audit events before a change of the file system; ``fsync`` and steps have none: they are wrapped to raise one.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
FSYNC, STEP = "faults.fsync", "faults.step"
#: Audit events before code from elsewhere can run.
EXECUTIONS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """A signal to the process, or an error, right before the ``moment``-th moment, counted from 0.

    Attributes:
        victim: The signal goes to the processes with this name that the process has started.
        only: Moments of other operations don't count.
        lasting: The error is raised before all later moments too, except ``spared`` operations.
        reading: Opening a file to read is a moment, too.
    """

    moment: int = -1
    signum: int | None = None
    victim: str | None = None
    only: str | None = None
    errno: int | None = None
    lasting: bool = False
    spared: tuple[str, ...] = (STEP,)
    reading: bool = False


@dataclass(frozen=True)
class Trial:
    """A command, and what befalls it.

    Attributes:
        command: ``("train", config file)`` or ``("evaluate", *overrides)``.
        folder: Changes to files under it are moments.
        seconds: The process is killed after that time.
        file_size: Writing beyond this size of a file fails.
        first: Signal that the process sends itself before it begins.
        ranks: Number of processes; the fault befalls the first.
    """

    command: tuple[str, ...]
    folder: Path
    fault: Fault = Fault()
    seconds: float | None = None
    file_size: int | None = None
    first: int | None = None
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The end of a trial.

    Attributes:
        code: Exit code, as in a shell.
        output: What it printed on stdout and stderr.
        errors: What it printed on stderr, without Lightning's hint at Slurm.
        moments: Operations and paths that could be hit by a fault, in order.
        outside: Changes outside of the folder, and commands that were started.
    """

    code: int
    output: str
    errors: str
    moments: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def is_one_line(self) -> bool:
        """True if it reported a problem in a few lines."""
        return "Traceback" not in self.output and 1 <= len(self.errors.strip().splitlines()) < 5


@contextlib.contextmanager
def trial_server(warm_up: Trial) -> Iterator[Callable[[Trial], Result]]:
    """Start a process that runs trials, one at a time; ``warm_up`` is run in that process itself."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, warm_up), daemon=True)
    process.start()
    theirs.close()

    def run(trial: Trial) -> Result:
        ours.send(trial)
        result = ours.recv()
        assert isinstance(result, Result)
        return result

    try:
        assert ours.recv() == 0
        yield run
    finally:
        ours.close()
        process.join(TIMEOUT)


def _serve(connection: Connection, warm_up: Trial) -> None:
    import torch

    from bcos_train.training import Classifier

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    for name in ("training_step", "validation_step"):
        setattr(Classifier, name, _with_event(getattr(Classifier, name), STEP, name))
    os.fsync = _with_event(os.fsync, FSYNC)  # type: ignore[assignment]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        connection.send(_run(warm_up.command))
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_fork(connection.recv()))


def _with_event(function: Callable[..., Any], event: str, name: str | None = None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        sys.audit(event, name or f"/proc/self/fd/{args[0]}")
        return function(*args, **kwargs)

    return call


def _fork(trial: Trial) -> Result:
    """Run a trial in new processes; once one of them fails, the others are killed."""
    port = _free_port()
    read_output, write_output = os.pipe()
    read_errors, write_errors = os.pipe()
    read_events, write_events = os.pipe()
    running = {}
    for rank in range(trial.ranks):
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(write_output, 1)
                os.dup2(write_errors, 2)
                if trial.ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(trial.ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
                _begin(trial, rank, write_events)
                os._exit(_run(trial.command))
            finally:
                os._exit(NOT_BEGUN)
        running[pid] = rank
    for descriptor in (write_output, write_errors, write_events):
        os.close(descriptor)
    codes: list[int] = []
    texts = _read_until_closed({read_output: b"", read_errors: b"", read_events: b""}, running, codes)
    while running:
        _wait(running, codes, 0)
    output, errors, events = (text.decode(errors="replace") for text in texts)
    lines = events.splitlines()
    return Result(
        code=next((code for code in codes if code), 0),
        output=output + errors,
        errors="".join(line for line in errors.splitlines(keepends=True) if "slurm.py" not in line),
        moments=tuple(line[1:] for line in lines if line[0] == "+"),
        outside=tuple(line[1:] for line in lines if line[0] == "!"),
    )


def _read_until_closed(texts: dict[int, bytes], running: dict[int, int], codes: list[int]) -> list[bytes]:
    deadline = time.monotonic() + TIMEOUT
    with selectors.DefaultSelector() as selector:
        for descriptor in texts:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(0.1):
                part = os.read(key.fd, 1 << 16)
                texts[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
                    os.close(key.fd)
            _wait(running, codes, os.WNOHANG)
            if time.monotonic() > deadline:
                codes.append(TIMED_OUT)
            if any(codes):
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
    return list(texts.values())


def _wait(running: dict[int, int], codes: list[int], options: int) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, options)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            codes.append(code if code >= 0 else 128 - code)
            del running[pid]


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _begin(trial: Trial, rank: int, events: int) -> None:
    os.environ.pop("WANDB_SERVICE", None)  # W&B's process, if another test has left one
    os.environ.update(trial.environment)
    for signum in SIGNALS:  # under nohup, SIGHUP would be ignored
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    if trial.first is not None:
        signal.signal(trial.first, signal.SIG_DFL)
        os.kill(os.getpid(), trial.first)
    if trial.seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, trial.seconds)
    if trial.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial.file_size, resource.RLIM_INFINITY))
    if rank == 0:
        sys.addaudithook(_Hook(trial, events))


class _Hook:
    """Reports what changes files or starts processes, and injects the fault."""

    def __init__(self, trial: Trial, events: int) -> None:
        self.folder, self.fault, self.events = os.path.realpath(trial.folder), trial.fault, events
        self.count = 0
        self.pid = os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EXECUTIONS:
            self._report("!", event, str(arguments[:2]))
        elif event in CHANGES or event in (FSYNC, STEP) or (event == "open" and self._counts(arguments)):
            paths = arguments[: 2 if event in ("os.rename", "os.link") else 1]
            self._before(event, *(os.fsdecode(path) for path in paths if not isinstance(path, int)))

    def _counts(self, arguments: tuple[Any, ...]) -> bool:
        path, _, flags = arguments
        if isinstance(path, int):
            return False
        return bool(flags & WRITING) or (self.fault.reading and os.path.isfile(path))

    def _before(self, event: str, *paths: str) -> None:
        if event == STEP:
            names = list(paths)
        else:
            resolved = [os.path.realpath(path) if event == FSYNC else _in_real_folder(path) for path in paths]
            if not all(path.startswith(f"{self.folder}/") for path in resolved):
                if event != "open" or paths[0] != os.devnull:
                    self._report("!", event, *resolved)
                return
            names = [os.path.relpath(path, self.folder).replace(f".{self.pid}.", ".pid.") for path in resolved]
        if self.fault.only not in (None, event):
            return
        self._report("+", event, *names)
        number, fault = self.count, self.fault
        self.count += 1
        if number != fault.moment and not (fault.lasting and number > fault.moment >= 0):
            return
        if fault.errno is not None and event not in fault.spared:
            raise OSError(fault.errno, os.strerror(fault.errno), paths[0])
        if fault.signum is not None:
            for pid in [self.pid] if fault.victim is None else _descendants(self.pid, fault.victim):
                os.kill(pid, fault.signum)

    def _report(self, mark: str, event: str, *paths: str) -> None:
        os.write(self.events, f"{mark}{event} {' '.join(paths)}".encode(errors="replace").replace(b"\n", b" ") + b"\n")


def _descendants(ancestor: int, name: str) -> list[int]:
    """Return the processes of that name that ``ancestor`` started, or one that it started."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            start, _, end = path.read_text().rpartition(")")
            parents[int(path.parent.name)] = int(end.split()[1])
            names[int(path.parent.name)] = start.partition("(")[2]
    found = []
    for pid in parents:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and names[pid].startswith(name):
            found.append(pid)
    return found


def _in_real_folder(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _run(command: tuple[str, ...]) -> int:
    """Run a command as its script does, and return its exit code."""
    from bcos_train import commands, run

    name, *arguments = command
    try:
        if name == "train":
            sys.argv = ["bcos_train.run", *arguments]
            return run.main()
        sys.argv = ["evaluate.py", *arguments]
        commands.evaluate()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
