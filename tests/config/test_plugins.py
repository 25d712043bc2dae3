"""Plugins are imported if the user names them, and never because of a config that they were sent."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
from toys import Command

from bcos_train.config import UserError, check, instantiate, load, load_plugins, register_target
from bcos_train.config.overrides import plugins_in_overrides

PLUGIN = """
from pathlib import Path
import toys
from bcos_train.config import register_target

Path({mark!r}).touch()

@register_target
class Net(toys.Net):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
"""

Write = Callable[[str], Path]


@pytest.fixture
def write_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a plugin into the current folder; the path returned exists once it has been imported."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])

    def write(name: str) -> Path:
        mark = tmp_path / f"{name}.imported"
        Path(f"{name}.py").write_text(PLUGIN.format(mark=str(mark)))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return mark

    return write


def test_named_on_the_command_line(command: Command, write_plugin: Write) -> None:
    mark = write_plugin("plugin_a")
    assert command("plugins=[plugin_a]", "model._target_=plugin_a.Net", "~model.depth", "model.width=3") == (0, "")
    assert mark.exists()
    net = instantiate(command.seen[0]["model"])
    assert (type(net).__name__, net.width) == ("Net", 3)
    assert command.seen[0]["plugins"] == ["plugin_a"]  # which the run folder records


def test_a_file_only_says_what_it_needs(command: Command, write_plugin: Write, tmp_path: Path) -> None:
    mark = write_plugin("plugin_b")
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/wide.yaml").write_text(
        "# @package _global_\nplugins: [plugin_b]\nmodel: {_target_: plugin_b.Net, width: 9}\n"
    )
    arguments = ("--config-dir", str(tmp_path / "mine"), "model=wide")
    message = "plugins=plugin_b: a plugin runs code, so a file can't load it; if you trust it, add plugins=[plugin_b]\n"
    assert command(*arguments) == (2, message)
    assert not mark.exists()
    assert command(*arguments, "plugins=[plugin_b]") == (0, "")
    assert mark.exists()
    assert command.seen[0]["model"]["width"] == 9


def test_its_names_are_validated_and_suggested(command: Command, write_plugin: Write) -> None:
    write_plugin("plugin_c")
    message = "model.widht=3: unknown key; did you mean width? (allowed: width)\n"
    assert command("plugins=[plugin_c]", "model._target_=plugin_c.Net", "~model.depth", "model.widht=3") == (2, message)
    code, err = command("plugins=[plugin_c]", "model._target_=Net")
    assert (code, "did you mean toys.Net or plugin_c.Net?" in err) == (2, True)


def test_a_sweep_over_plugins(command: Command, write_plugin: Write) -> None:
    marks = [write_plugin(name) for name in ("plugin_d", "plugin_e")]
    assert command("-m", "plugins=[plugin_d],[plugin_e]") == (0, "")
    assert all(mark.exists() for mark in marks)


def write_run(folder: Path, plugin: str) -> Path:
    """The folder of a run that somebody sent, the config of which names a plugin."""
    folder.mkdir(parents=True)
    config = f"model: {{_target_: {plugin}.Net}}\ndataset: {{_target_: toys.Shards, root: /x}}\nplugins: [{plugin}]\n"
    optimizer = "optimizer: {_target_: toys.Adam, _partial_: true, lr: 0.1}\n"
    (folder / "config.yaml").write_text(config + optimizer)
    return folder


REFUSED = "plugins=evil: a plugin runs code, so a file can't load it; if you trust it, add plugins=[evil]"


@pytest.mark.parametrize(
    "arguments",
    {
        "as the main config": ("--config-path", "{run}", "--config-name", "config"),
        "beside an own folder": ("--config-path", "{run}", "--config-name", "config", "--config-dir", "own"),
        "beside another plugin": ("-cp", "{run}", "-cn", "config", "++name=${{plugins.0}}", "-cd", "own"),
        "by the search path": ("hydra.searchpath=[file://{run}/sent]", "recipe=sent"),
        "by interpolation": ("++plugins=[${{name}}]", "name=evil"),
        "in a sweep": ("-m", "hydra.searchpath=[file://{run}/sent]", "recipe=sent", "seed=1,2"),
    }.values(),
    ids=" ".join,
)
def test_a_runs_config_imports_nothing(
    arguments: tuple[str, ...], command: Command, write_plugin: Write, tmp_path: Path
) -> None:
    mark = write_plugin("evil")
    run = write_run(tmp_path / "run", "evil")
    (run / "sent/recipe").mkdir(parents=True)
    (run / "sent/recipe/sent.yaml").write_text("# @package _global_\nplugins: [evil]\n")
    (Path.cwd() / "own").mkdir()
    (Path.cwd() / "own/note.yaml").write_text("plugins: [plugin_of_mine]\n")
    code, err = command(*(argument.format(run=run) for argument in arguments))
    assert (code, command.seen) == (2, [])
    assert err.startswith((REFUSED, "recipe=sent: no such choice", "plugins: '${name}' is not the name of a module"))
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_the_config_of_a_run_says_which_plugin_is_missing(
    write_plugin: Write, command: Command, tmp_path: Path
) -> None:
    mark = write_plugin("evil")
    config = load(write_run(tmp_path / "run", "evil") / "config.yaml")
    assert [str(problem) for problem in check(config, root=toys.train)] == [
        "plugins=evil: saved configs can't load plugins, since a plugin runs code; if you trust it, add plugins=[evil]"
    ]
    with pytest.raises(UserError, match=r"^_target_=evil\.Net: not an allowed name"):
        instantiate(config["model"])
    assert not mark.exists()
    # Only the user can decide otherwise.
    load_plugins(["evil"])
    assert check(config, root=toys.train) == []
    assert mark.exists()


MESSAGES = {
    "not there": ("nowhere", "plugins=nowhere: no module named nowhere, neither on the Python path nor in "),
    "inner module": ("toys.inner", "plugins=toys.inner: no module named toys.inner, neither"),
    "its own import": ("needy", "plugins=needy: absent_package, which needy imports, is not installed"),
    "a path": ("my/plugin.py", "plugins: 'my/plugin.py' is not the name of a module; write plugins=[my_package]"),
}


@pytest.mark.parametrize(("name", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages(name: str, message: str, command: Command, write_plugin: Write) -> None:
    Path("needy.py").write_text("import absent_package\n")
    code, err = command(f"plugins=[{name}]")
    assert (code, command.seen) == (2, [])
    assert err.startswith(message)


def test_a_bug_in_a_plugin_keeps_its_traceback(command: Command, write_plugin: Write) -> None:
    Path("faulty.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        command("plugins=[faulty]")


@pytest.mark.parametrize("value", ["3", "plugin_a", "[3]"])
def test_another_type(value: str, command: Command) -> None:
    code, err = command(f"plugins={value}")
    assert (code, err.startswith("plugins")) == (2, True)


def test_names_on_a_command_line() -> None:
    overrides = ["plugins=[a,b.c]", "++plugins=[d]", "seed=1", "plugins=[", "plugins=x", "plugins=[e],[f]", "~plugins"]
    assert plugins_in_overrides(overrides) == ["a", "b.c", "d"]


@pytest.mark.parametrize(
    "target",
    [lambda: 0, 3, toys.Net.__init__, "os.system"],
    ids=lambda target: str(getattr(target, "__qualname__", target)),
)
def test_only_what_a_config_can_name_is_registered(target: object) -> None:
    with pytest.raises(ValueError, match=r"register_target takes|only name classes and functions"):
        register_target(target)  # type: ignore[type-var]
