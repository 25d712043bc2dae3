"""Configs that somebody sent: nothing in them runs code, writes outside the run folder or ends in a traceback."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcos_train.config import UserError, load
from bcos_train.config.cli import entry_point
from bcos_train.utils.terminal import printable

PROJECT = {
    "train.yaml": """
defaults:
  - _self_
  - recipe: null
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
seed: 0
runs: runs
hydra:
  run: {dir: .}
  sweep: {dir: "${runs}/.sweep", subdir: .}
  output_subdir: null
  job: {chdir: false}
""",
    "recipe/long.yaml": "# @package _global_\nseed: 7",
}
#: A module whose import or call leaves a mark.
PLANTED = """
from pathlib import Path
Path({mark!r}).touch()
def run(**kwargs): pass
class Handler: pass
"""


def root(seed: int = 0, runs: str = "runs", plugins: list[str] | None = None) -> None:
    """Parameters: the top-level keys."""


class Machine:
    """A folder to work in, a folder of configs that somebody sent, and a command."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.project, self.sent, self.work = folder / "project", folder / "sent", folder / "work"
        #: Exists once planted code has run, or contains less than before once a file has been emptied.
        self.mark, self.thesis = folder / "mark", folder / "thesis.txt"
        self.thesis.write_text("years of work")
        write(self.project, PROJECT)
        write(folder / "planted", {"planted/__init__.py": PLANTED.format(mark=str(self.mark))})
        monkeypatch.syspath_prepend(folder / "planted")
        self.work.mkdir()
        self.started: list[dict[str, object]] = []

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            entry_point(config_name="train", root=root, config_dir=self.project)(self.main)()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, self.capsys.readouterr().err

    def main(self, config: dict[str, object]) -> None:
        self.started.append({**config, "environment": os.environ.get("PLANTED"), "folder": Path.cwd()})

    def assert_untouched(self) -> None:
        assert not self.mark.exists()
        assert "planted" not in sys.modules
        assert self.thesis.read_text() == "years of work"
        assert "PLANTED" not in os.environ
        assert list(self.work.iterdir()) == []
        assert self.started == []


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Machine]:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv("PLANTED", raising=False)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    machine = Machine(tmp_path, monkeypatch, capsys)
    monkeypatch.chdir(machine.work)
    yield machine
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    sys.modules.pop("planted", None)


#: Key, contents of a config; ``{thesis}`` and ``{outside}`` are paths.
NODES = {
    "callback by a variable set later": (
        "hydra.",
        "hydra: {{job: {{env_set: {{'1': planted.run, "
        "x: hydra._internal.core_plugins.basic_launcher.BasicLauncher}}}}, "
        "callbacks: {{x: {{_target_: '${{hydra.job.env_set.${{oc.env:HYDRA_FULL_ERROR,x}}}}'}}}}}}",
    ),
    "callback": ("hydra.callbacks.x._target_", "hydra: {{callbacks: {{x: {{_target_: planted.run}}}}}}"),
    "log handler that imports": (
        "hydra.job_logging.",
        "hydra: {{job_logging: {{version: 1, root: {{handlers: [h]}}, handlers: "
        "{{h: {{class: logging.StreamHandler, stream: 'ext://planted.run'}}}}}}}}",
    ),
    "log handler that empties a file": (
        "hydra.job_logging.",
        "hydra: {{job_logging: {{version: 1, root: {{handlers: [h]}}, handlers: "
        "{{h: {{class: logging.FileHandler, filename: '{thesis}', mode: w}}}}}}}}",
    ),
    "Hydra's log handler that empties a file": (
        "hydra.hydra_logging.",
        "hydra: {{hydra_logging: {{version: 1, root: {{handlers: [h]}}, handlers: "
        "{{h: {{class: logging.FileHandler, filename: '{thesis}', mode: w}}}}}}}}",
    ),
    "log factory": (
        "hydra.job_logging.",
        "hydra: {{job_logging: {{version: 1, root: {{}}, formatters: {{f: {{(): planted.run}}}}}}}}",
    ),
    "environment": ("hydra.job.env_set.PLANTED", "hydra: {{job: {{env_set: {{PLANTED: '1'}}}}}}"),
    "copied environment": ("hydra.job.env_copy", "hydra: {{job: {{env_copy: [HOME]}}}}"),
    "folder of the run": ("hydra.run.dir", "hydra: {{run: {{dir: '{outside}'}}}}"),
    "folder of a sweep": ("hydra.sweep.dir", "hydra: {{mode: MULTIRUN, sweep: {{dir: '{outside}'}}}}"),
    "subfolder of a sweep": ("hydra.sweep.subdir", "hydra: {{mode: MULTIRUN, sweep: {{subdir: '{outside}'}}}}"),
    "folder of the configs": ("hydra.output_subdir", "hydra: {{output_subdir: '{outside}'}}"),
    "working folder": ("hydra.job.chdir", "hydra: {{job: {{chdir: true}}}}"),
    "name of the log": ("hydra.job.name", "hydra: {{job: {{name: ../../x}}}}"),
    "sweeper": ("hydra.sweeper._target_", "hydra: {{mode: MULTIRUN, sweeper: {{_target_: planted.run}}}}"),
    "jobs with Hydra's keys": (
        "hydra.sweeper.params.+hydra.job.env_set.PLANTED",
        "hydra: {{mode: MULTIRUN, sweeper: {{params: {{+hydra.job.env_set.PLANTED: 1}}}}}}",
    ),
    "jobs with plugins": (
        "hydra.sweeper.params.plugins",
        "plugins: [planted]\nhydra: {{mode: MULTIRUN, sweeper: {{params: {{plugins: '[planted]'}}}}}}",
    ),
    "jobs with another package": (
        "hydra.sweeper.params.+recipe@hydra.callbacks",
        "hydra: {{mode: MULTIRUN, sweeper: {{params: {{+recipe@hydra.callbacks: long}}}}}}",
    ),
    "a command line of its own": (
        "hydra.overrides",
        "plugins: [planted]\nhydra: {{overrides: {{task: ['plugins=[planted]']}}}}",
    ),
    # Refused by Hydra, which names the file in its way.
    "the whole node by reference": (
        "In '",
        "hydra: ${{other}}\nother: {{callbacks: {{x: {{_target_: planted.run}}}}}}",
    ),
    "launcher": ("hydra.launcher._target_", "hydra: {{mode: MULTIRUN, launcher: {{_target_: planted.run}}}}"),
    "plugin": ("plugins", "plugins: [planted]"),
}


def assert_one_line(err: str, key: str, file: str) -> None:
    assert err.count("\n") == 1, err
    assert err.startswith(key), err
    assert file in err or key in ("In '", "plugins"), err
    assert "Traceback" not in err


@pytest.mark.parametrize("route", ["--config-dir", "searchpath", "--config-path", "--help"])
@pytest.mark.parametrize(("key", "content"), NODES.values(), ids=NODES)
def test_a_sent_config_sets_only_listed_keys(key: str, content: str, route: str, machine: Machine) -> None:
    text = content.format(thesis=machine.thesis, outside=machine.sent.parent / "outside")
    name = "config" if route == "--config-path" else "recipe/sent"
    header = "" if name == "config" else "# @package _global_\n"
    write(machine.sent, {f"{name}.yaml": f"{header}{text}\n"})
    before = set(machine.sent.parent.iterdir())
    code, err = machine(
        *{
            "--config-dir": ("--config-dir", str(machine.sent), "recipe=sent"),
            "searchpath": (f"hydra.searchpath=[file://{machine.sent}]", "+recipe=sent", "~recipe"),
            "--config-path": ("--config-path", str(machine.sent), "--config-name", "config"),
            "--help": ("--config-dir", str(machine.sent), "recipe=sent", "--help"),
        }[route]
    )
    machine.assert_untouched()
    assert set(machine.sent.parent.iterdir()) == before
    if route == "--help" and key == "plugins":
        return  # shown only
    assert code == 2
    if route != "searchpath":  # its recipes are no choices
        assert_one_line(err, key, f"{machine.sent}/{name}.yaml")


def test_the_message(machine: Machine) -> None:
    write(machine.sent, {"recipe/sent.yaml": "# @package _global_\nhydra: {job: {env_set: {PYTHONPATH: /x}}}"})
    assert machine("--config-dir", str(machine.sent), "recipe=sent") == (
        2,
        f"hydra.job.env_set.PYTHONPATH=/x in {machine.sent}/recipe/sent.yaml: only the command line may set this key "
        "(allowed in files: hydra.mode, hydra.verbose, hydra.sweeper.max_batch_size, hydra.sweeper.params.<key>, "
        "resources of hydra.launcher)\n",
    )


def test_a_search_path_imports_nothing(machine: Machine) -> None:
    write(machine.sent, {"config.yaml": "hydra: {searchpath: ['pkg://planted']}"})
    code, err = machine("--config-path", str(machine.sent), "--config-name", "config", "--info", "searchpath")
    machine.assert_untouched()
    assert code == 2
    assert_one_line(err, "hydra.searchpath", str(machine.sent))


def test_a_defaults_list_puts_nothing_under_hydra(machine: Machine) -> None:
    write(machine.project, {"recipe/net.yaml": "_target_: planted.run"})
    for group in ("hydra.callbacks.x", "hydra.job.env_set"):
        write(machine.sent, {"recipe/sent.yaml": f"# @package _global_\ndefaults: [/recipe@{group}: net]"})
        code, err = machine("--config-dir", str(machine.sent), "recipe=sent")
        machine.assert_untouched()
        assert code == 2
        assert_one_line(err, f"{group}._target_=planted.run", str(machine.project))


SLURM = {
    "commands": ("{setup: [touch mark]}", "hydra.launcher.setup=['touch mark'] in "),
    "other options": ("{additional_parameters: {wrap: x}}", "hydra.launcher.additional_parameters.wrap=x in "),
    "folder": ("{submitit_folder: /x}", "hydra.launcher.submitit_folder=/x in "),
    "line break": ('{partition: "x\\ntouch mark"}', "hydra.launcher.partition=x\\ntouch mark in "),
    "reference": ("{partition: '${oc.env:HOME}'}", "hydra.launcher.partition=${oc.env:HOME} in "),
    "type": ("{nodes: many}", "Value 'many'"),
    "misprint": ("{timeout: 5}", "Key 'timeout' not in 'SlurmQueueConf'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Hydra: a file takes the place of its launcher
@pytest.mark.parametrize("chosen", ["in the file", "by its own file", "on the command line"])
@pytest.mark.parametrize(("launcher", "message"), SLURM.values(), ids=SLURM)
def test_slurm_gets_only_resources(launcher: str, message: str, chosen: str, machine: Machine) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    defaults = "" if chosen == "on the command line" else "defaults: [override /hydra/launcher: submitit_slurm]\n"
    write(machine.sent, {"recipe/sent.yaml": f"# @package _global_\n{defaults}hydra: {{launcher: {launcher}}}"})
    if chosen == "by its own file":
        write(machine.sent, {"hydra/launcher/submitit_slurm.yaml": launcher})
    arguments = ["hydra/launcher=submitit_slurm"] if not defaults else []
    code, err = machine("-m", "--config-dir", str(machine.sent), "recipe=sent", *arguments, "seed=1,2")
    machine.assert_untouched()
    assert code == 2
    assert err.count("\n") == 1
    assert message in err or chosen == "by its own file", err


def test_a_line_break_in_a_folder_is_no_command(machine: Machine) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for runs in ('"x\\ntouch mark"', '"${hydra:job.id}\\ntouch mark"'):
        write(machine.sent, {"recipe/sent.yaml": f"# @package _global_\nruns: {runs}"})
        flags = ["-m", "--config-dir", str(machine.sent), "recipe=sent", "hydra/launcher=submitit_slurm", "seed=1,2"]
        code, err = machine(*flags)
        machine.assert_untouched()
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("hydra.launcher")


ALLOWED = {
    "a sweep": "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2,3', runs: a}}}",
    "log level": "hydra: {verbose: false}",
    "Hydra's choices": "defaults: [override /hydra/job_logging: stdout, override /hydra/hydra_logging: default]",
    "what the project sets": "hydra: {run: {dir: .}, output_subdir: null}",
}


@pytest.mark.parametrize("content", ALLOWED.values(), ids=ALLOWED)
def test_what_files_may_set(content: str, machine: Machine) -> None:
    write(machine.sent, {"recipe/sent.yaml": f"# @package _global_\n{content}"})
    assert machine("--config-dir", str(machine.sent), "recipe=sent")[0] == 0
    assert len(machine.started) == (3 if "MULTIRUN" in content else 1)


def test_resources_in_a_file(machine: Machine) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    resources = "partition: a100,h100, timeout_min: 10, mem_per_gpu: 32GB, exclude: 'node[1-3]', qos: null"
    content = f"defaults: [override /hydra/launcher: submitit_slurm]\nhydra: {{launcher: {{{resources}}}}}"
    content = content.replace("a100,h100", "'a100,h100'")
    write(machine.sent, {"recipe/sent.yaml": f"# @package _global_\n{content}"})
    assert machine("--config-dir", str(machine.sent), "recipe=sent", "--cfg", "hydra") == (0, "")


def test_the_command_line_sets_any_key(machine: Machine) -> None:
    arguments = ["+hydra.job.env_set.PLANTED=2", "hydra.run.dir=here", "hydra.job.chdir=true", "hydra.verbose=[a]"]
    assert machine(*arguments) == (0, "")
    assert machine.started[0]["environment"] == "2"
    assert machine.started[0]["folder"] == machine.work / "here"


def test_a_run_folder_as_the_main_config(machine: Machine) -> None:
    """It has no ``hydra`` node, so Hydra's own defaults apply."""
    write(machine.sent, {"config.yaml": "seed: 3"})
    assert machine("--config-path", str(machine.sent), "--config-name", "config", "hydra.run.dir=.")[0] == 0
    assert machine.started[0]["seed"] == 3


YAML = {
    "deep lists": ("[" * 500 + "]" * 500, "nested more than 40 levels deep"),
    "very deep lists": ("a: " + "[" * 100_000, "nested more than 40 levels deep"),
    "deep mappings": ("".join(f"{' ' * n}a:\n" for n in range(2000)), "nested more than 40 levels deep"),
    "aliases": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)),
        "more than 100,000 values, with those that aliases repeat",
    ),
    "an alias of itself": ("a: &a [*a]", "more than 100,000 values, with those that aliases repeat"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_yaml_that_exhausts_memory_or_stack(text: str, message: str, machine: Machine) -> None:
    write(machine.sent, {"recipe/sent.yaml": text})
    path = machine.sent / "recipe/sent.yaml"
    for flags in ([], ["--help"], ["--cfg", "job"]):
        assert machine("--config-dir", str(machine.sent), "recipe=sent", *flags) == (2, f"{path}: {message}\n")
    with pytest.raises(UserError, match=message):
        load(path)
    machine.assert_untouched()


def test_files_that_include_each_other(machine: Machine) -> None:
    write(machine.sent, {"recipe/sent.yaml": "defaults: [other]", "recipe/other.yaml": "defaults: [sent]"})
    code, err = machine("--config-dir", str(machine.sent), "recipe=sent")
    assert (code, err.count("\n")) == (2, 1)


def test_a_message_is_printed_without_escape_sequences(machine: Machine) -> None:
    code, err = machine("seed=\x1b[2Jx")
    assert (code, "\x1b" in err) == (2, False)
    write(machine.sent, {"recipe/a\x1b[2J.yaml": "a: 1"})
    code, err = machine("--config-dir", str(machine.sent), "recipe=nope")
    assert (code, "\x1b" in err, printable("a\x1b[2J") in err) == (2, False, True)
