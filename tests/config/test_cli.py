import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from toys import Command

from bcos_train.config import UserError, instantiate
from bcos_train.config.cli import overridden_keys

CHOICES = "(choices: broken, net, resnet18 and resnet50)"
KEYS = "(allowed: depth, norm, b)"
RESNET5 = f"model=resnet5: no such choice; did you mean resnet50? {CHOICES}"
DEPT = f"model.dept=18: unknown key; did you mean depth? {KEYS}"
QUOTES = "can't be read; a value with special characters takes quotes within quotes"
MISTAKES = {
    "choice": (["model=resnet5"], RESNET5),
    "choice far": (["model=vit"], f"model=vit: no such choice {CHOICES}"),
    "inner choice": (
        ["recipe=cifar10/short"],
        "recipe=cifar10/short: no such choice (choices: long and sweep)",
    ),
    "group": (["modle=resnet50"], "modle: unknown key or config group; did you mean model?"),
    "group far": (["qqq=1"], "qqq: unknown key or config group"),
    "optional group": (["recpe=long"], "recpe: unknown key or config group; did you mean recipe?"),
    "hydra group": (
        ["hydra/laucher=basic"],
        "hydra/laucher: unknown config group; did you mean hydra/launcher?",
    ),
    "key": (["model.dept=18"], DEPT),
    "added key": (["+model.dept=18"], DEPT),
    "forced key": (["++model.dept=18"], DEPT),
    "no key": (["=3"], "=3: settings have the form key=value, and this has no key\n"),
    "no added key": (["++"], "++: settings have the form key=value, and this has no key\n"),
    "key of another program": (["arch=resnet50"], "arch: unknown key or config group; did you mean model?\n"),
    "key without its group": (["lr=0.1"], "lr: unknown key or config group; did you mean optimizer.lr?"),
    "key in a wrong group": (["modle.depth=18"], "modle: unknown key or config group; did you mean model?"),
    "number": (["optimizer.lr=abc"], "optimizer.lr=abc: expected a number"),
    "list": (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: expected [a number, a number]"),
    "word": (["resnet50"], "resnet50: settings have the form key=value; did you mean model=resnet50?"),
    "word near": (["resnet5"], "resnet5: settings have the form key=value; did you mean model=resnet50?"),
    "group alone": (["dataset"], "dataset: no value given; choices: dataset=cifar10 or digits"),
    "key alone": (["model.depth"], "model.depth: no value given; write model.depth=…"),
    "bracket": (["name=[1"], f"name=[1: {QUOTES}: 'name=\"[1\"'"),
    "equals sign": (["name=a=b"], f"name=a=b: {QUOTES}: 'name=\"a=b\"'"),
    "function": (["seed=int(x)"], "seed=int(x): 'int(x)': invalid literal for int() with base 10: 'x'"),
    "missing": (["optimizer._partial_=false"], "optimizer.params: needs a value: add optimizer.params=…"),
    "missing value": (["seed=???"], "seed: needs a value (a whole number): add seed=…"),
    "sweep without -m": (
        ["seed=1,2"],
        "seed=1,2: several values; add -m for a run with each\n",
    ),
    "list without brackets": (
        ["optimizer.betas=0.9,0.99"],
        "optimizer.betas=0.9,0.99: several values; add -m for a run with each, or write optimizer.betas=[0.9,0.99] for "
        "a list\n",
    ),
    "comma in a text": (
        ["dataset=cifar10", "dataset.root=/data/a,b"],
        "dataset.root=/data/a,b: several values; add -m for a run with each, or quote a value that contains a comma "
        "twice: 'dataset.root=\"/data/a,b\"'\n",
    ),
    "choices without -m": (["model=net,resnet18"], "model=net,resnet18: several values; add -m for a run with each\n"),
    "recipes without -m": (
        ["recipe=long,sweep"],
        "recipe=long,sweep: several values; add -m for a run with each, or write recipe=[long,sweep] for all\n",
    ),
    "list of choices": (
        ["model=[net,resnet18]"],
        "model=[net,resnet18]: takes one choice; -m model=net,resnet18 starts a run with each\n",
    ),
    "list of wrong choices": (["model=[net,vit]"], f"model=vit: no such choice {CHOICES}\n"),
    "no choice": (["model=null"], f"model=null: no such choice {CHOICES}\n"),
    "choice that is off": (["extra=null"], "extra=null: no such choice; did you mean none? (choices: none and one)\n"),
    "choice that is false": (["extra=off"], "extra=off: no such choice; did you mean none? (choices: none and one)\n"),
    "flag": (["--lr", "0.1"], "--lr: no such option; settings are written without dashes: lr=…"),
    "flag with value": (["--seed=1"], "--seed=1: no such option; settings are written without dashes: seed=1"),
    "flag near": (["--config_dir=x"], "--config_dir=x: no such option; did you mean --config-dir?\n"),
    "flag with one dash": (["-config-dir", "x", "seed=1"], "-config-dir: options have two dashes: --config-dir\n"),
    "flag with one dash and value": (["-cfg=job"], "-cfg: options have two dashes: --cfg\n"),
    "bad flag value": (
        ["--cfg", "jop"],
        "argument --cfg/-c: invalid choice: 'jop'",
    ),
    "config name": (["-cn", "trian"], "--config-name trian: no such config; did you mean train? (choices: train)"),
    "config dir": (["-cd", "nowhere"], "nowhere: no such folder of configs"),
    "interpolation": (["name=${nope}"], "name: Interpolation key 'nope' not found"),
    "delete": (["~model.nope"], "Could not delete from config. 'model.nope' does not exist"),
    "delete a required key": (["~model"], "~model: model can't be removed; choose another with model=…"),
    "hydra's key": (["hydra.launcher.nope=1"], "Could not override 'hydra.launcher.nope'"),
    "group that is not in use": (["extra=one"], "Could not override 'extra'. No match in the defaults list."),
    "broken file": (["model=broken"], "while parsing a flow node expected the node content"),
    "mapping for a group": (["model={depth: 3}"], "model={'depth': 3}: no such choice (choices: "),
    "flags apart": (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg or --help"),
    "pickle": (["--experimental-rerun", "x"], "--experimental-rerun: not supported, because it unpickles a file"),
    "target": (["model._target_=os.system"], "model._target_=os.system: not an allowed name"),
    "callback": (
        ["+hydra.callbacks.x._target_=os.system"],
        "hydra.callbacks.x._target_=os.system: not an allowed name",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_its_message_and_exit_code_2(command: Command, arguments: list[str], message: str) -> None:
    code, err = command(*arguments)
    assert (code, command.seen) == (2, [])
    assert err.startswith(message)
    assert "Traceback" not in err
    assert "HYDRA_FULL_ERROR" not in err


def test_the_key_from_which_others_are_derived(command: Command) -> None:
    with (command.configs / "train.yaml").open("a") as file:
        file.write("trainer: {span: '${trainer.seconds}', seconds: '${seed}'}\n")
    for key in ("span", "spam", "seconds"):
        assert command(f"{key}=3") == (2, f"{key}: unknown key or config group; did you mean seed?\n")


def test_all_problems_at_once(command: Command) -> None:
    code, err = command("model.dept=18", "optimizer.lr=abc", "++seed=x", "dataset.mode=trian")
    assert code == 2
    assert sorted(err.splitlines()) == [
        "dataset.mode=trian: expected train or val; did you mean train?",
        DEPT,
        "optimizer.lr=abc: expected a number",
        "seed=x: expected a whole number",
    ]


def test_main_gets_plain_containers(command: Command) -> None:
    assert command("model=resnet50", "dataset=cifar10", "recipe=long") == (0, "")
    assert command.seen == [
        {
            "optimizer": {"_target_": "toys.Adam", "_partial_": True, "lr": 0.01},
            "dataset": {"_target_": "toys.Shards", "root": "/data/cifar"},
            "model": {"_target_": "toys.Net", "depth": 50},
            "seed": 7,
            "name": "resnet50",
        }
    ]
    assert all(type(value) in (dict, int, str) for value in command.seen[0].values())


SUITS = """# @package _global_
seed: 7
suits:
  what: the net
  not: {model: [resnet1*], dataset: [cifar10]}
"""
UNSUITED = {
    "pattern": (["model=resnet18", "recipe=own"], "recipe=own: not for model=resnet18; it is for the net\n"),
    "name": (
        ["model=net", "dataset=cifar10", "recipe=own"],
        "recipe=own: not for dataset=cifar10; it is for the net\n",
    ),
    "list": (["model=resnet18", "recipe=[own]"], "recipe: not for model=resnet18; it is for the net\n"),
    "one job of several": (
        ["-m", "model=net,resnet18", "recipe=own"],
        "recipe=own: not for model=resnet18; it is for the net\n",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), UNSUITED.values(), ids=UNSUITED)
def test_a_recipe_for_other_choices(command: Command, arguments: list[str], message: str) -> None:
    (command.configs / "recipe" / "own.yaml").write_text(SUITS)
    assert command(*arguments) == (2, message)
    assert command.seen == []


def test_suits_is_removed_from_the_config(command: Command) -> None:
    (command.configs / "recipe" / "own.yaml").write_text(SUITS)
    for recipe in ("own", "[own]"):
        assert command("model=net", "dataset=digits", f"recipe={recipe}") == (0, "")
        assert "suits" not in command.seen[-1]
        assert command.seen[-1]["seed"] == 7
    # It isn't for the command line either.
    assert command("suits.what=all")[1].startswith("suits: unknown key or config group")


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_parameter_that_the_yaml_leaves_out_can_be_set(command: Command, sign: str) -> None:
    assert command(f"{sign}model.b=1.5", f"{sign}devices=2", "~dataset.root", "++dataset.root=x") == (0, "")
    assert command.seen[0]["model"] == {"_target_": "toys.Net", "depth": 18, "b": 1.5}
    assert command.seen[0]["devices"] == 2


def test_options_of_a_model_chosen_by_name(command: Command) -> None:
    assert command("model=net", "model.name=bignet", "model.depth=3")[0] == 0
    assert type(instantiate(command.seen[0]["model"])) is toys.BigNet
    assert command("model=net", "model.name=ney")[1] == "model.name=ney: unknown model; did you mean bignet?\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_of_main(command: Command, returned: int | None, code: int) -> None:
    command.outcome = returned
    assert command() == (code, "")


def test_a_user_error_in_main(command: Command) -> None:
    command.outcome = UserError("dataset.root: no such folder")
    assert command() == (2, "dataset.root: no such folder\n")


def test_full_error_shows_the_traceback_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, err = command("model=resnet5")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.rstrip().endswith(MISTAKES["choice"][1])


def test_a_bug_keeps_its_traceback(command: Command) -> None:
    command.outcome = RuntimeError("a fault")
    with pytest.raises(RuntimeError, match="a fault") as caught:
        command()
    assert "main" in [entry.name for entry in caught.traceback]
    assert not any("hydra" in str(entry.path) for entry in caught.traceback[-2:])


@pytest.mark.parametrize("where", ["main", "compose"])
def test_an_interrupt_ends_silently(command: Command, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if where == "main":
        command.outcome = KeyboardInterrupt()  # type: ignore[assignment]
    else:
        monkeypatch.setattr(
            "bcos_train.config.composition.Composer.compose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    assert command() == (130, "")


def test_the_environment_and_arguments_are_as_before(command: Command) -> None:
    seen = []
    command.main = lambda config: seen.append(os.environ.get("HYDRA_FULL_ERROR"))  # type: ignore[method-assign, assignment]
    command("seed=1")
    assert sys.argv == ["train.py", "seed=1"]
    assert (seen, os.environ.get("HYDRA_FULL_ERROR")) == ([None], None)


def test_a_run_leaves_no_files_and_no_logging(command: Command) -> None:
    ours = logging.getLogger("ours")
    before = list(logging.getLogger().handlers)
    command()
    assert list(Path.cwd().iterdir()) == []
    assert logging.getLogger().handlers == before
    assert not ours.disabled


class TestSweep:
    def test_runs_every_job(self, command: Command) -> None:
        assert command("-m", "model=resnet18,resnet50", "model.b=1,2") == (0, "")
        assert [(c["model"]["depth"], c["model"]["b"]) for c in command.seen] == [(18, 1), (18, 2), (50, 1), (50, 2)]
        assert [str(p.relative_to(Path.cwd())) for p in Path.cwd().rglob("*.*")] == ["sweeps/multirun.yaml"]

    def test_requested_by_the_config(self, command: Command) -> None:
        assert command("recipe=sweep") == (0, "")
        assert [config["seed"] for config in command.seen] == [1, 2, 3]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        {
            "last job's choice": (
                ["model=resnet18,resnet5"],
                RESNET5,
            ),
            "choice for all": (
                ["model=resnet5", "seed=1,2"],
                RESNET5,
            ),
            "last job's value": (["seed=1,2,x"], "seed=x: expected a whole number"),
            "key": (["model.dept=1,1"], f"model.dept=1: unknown key; did you mean depth? {KEYS}"),
        }.values(),
    )
    def test_is_checked_before_the_first_job(self, command: Command, arguments: list[str], message: str) -> None:
        assert command("-m", *arguments) == (2, f"{message}\n")
        assert command.seen == []

    def test_continues_after_a_failed_job(self, command: Command) -> None:
        def main(config: dict[str, Any]) -> int | None:
            command.seen.append(config)
            if config["seed"] == 1:
                raise RuntimeError("a fault")
            if config["seed"] == 2:
                raise UserError("no such folder")
            return None

        command.main = main  # type: ignore[method-assign]
        code, err = command("-m", "seed=1,2,3")
        assert (code, len(command.seen)) == (2, 3)
        assert "RuntimeError: a fault" in err
        assert err.endswith("no such folder\n")

    @pytest.mark.parametrize("code", [130, 143])
    def test_stops_after_a_signal(self, command: Command, code: int) -> None:
        command.outcome = code
        assert command("-m", "seed=1,2,3") == (code, "")
        assert len(command.seen) == 1


class TestFlags:
    def test_cfg_prints_the_config_even_if_wrong(self, command: Command) -> None:
        assert command("--cfg", "job", "model.dept=18") == (0, "")
        assert "dept: 18" in command.printed
        assert command.seen == []

    @pytest.mark.parametrize(
        "flags", [["--help"], ["--hydra-help"], ["--info", "defaults"], ["--version"]], ids=" ".join
    )
    def test_print_and_exit(self, command: Command, flags: list[str]) -> None:
        assert command(*flags) == (0, "")
        assert command.printed
        assert command.seen == []

    def test_resolve_and_package(self, command: Command) -> None:
        command("--cfg", "job", "--resolve", "--package", "name", "model=resnet50")
        assert command.printed.strip() == "resnet50"

    def test_config_name_and_folders(self, command: Command, tmp_path: Path) -> None:
        toys.write_configs(tmp_path / "other", {"small.yaml": toys.CONFIGS["train.yaml"].replace("seed: 0", "seed: 5")})
        (tmp_path / "more/model").mkdir(parents=True)
        (tmp_path / "more/model/tiny.yaml").write_text("{_target_: toys.Net, depth: 2}")
        assert command("-cp", str(tmp_path / "other"), "-cn", "small", "-cd", "../more", "model=tiny") == (0, "")
        assert (command.seen[0]["seed"], command.seen[0]["model"]["depth"]) == (5, 2)


def test_overridden_keys(command: Command) -> None:
    seen: list[str] = []
    command.main = lambda config: seen.extend(overridden_keys())  # type: ignore[method-assign, assignment, func-returns-value]
    command("model=resnet50", "model.b=2", "++name=${hydra:runtime.choices.model}", "~recipe", "hydra.verbose=false")
    assert seen == ["model", "model.b", "name", "recipe"]
