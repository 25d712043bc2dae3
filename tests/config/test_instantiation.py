"""What a config may build, and that one from elsewhere builds nothing else."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from omegaconf import OmegaConf

from bcos_train.config import UserError, check, instantiate


class TestBuilds:
    def test_a_node(self) -> None:
        net = instantiate({"_target_": "toys.Net", "depth": 50})
        assert (type(net), net.depth, net.b) == (toys.Net, 50, 2.0)

    def test_inner_nodes_first(self) -> None:
        config = {
            "data": [{"_target_": "toys.Shards", "root": "/x", "augment": {"_target_": "toys.Augment", "size": 8}}]
        }
        built = instantiate(config)
        assert toys.CALLS == ["Augment", "Shards"]
        assert built["data"][0].augment.size == 8

    def test_partial(self) -> None:
        make = instantiate({"_target_": "toys.Adam", "_partial_": True, "lr": 0.1, "betas": [0.5, 0.6]})
        assert isinstance(make, partial)
        assert toys.CALLS == []
        assert make([1.0]).betas == [0.5, 0.6]

    def test_nodes_within_a_partial_one_are_built(self) -> None:
        make = instantiate(
            {"_target_": "toys.Net", "_partial_": True, "norm": {"_target_": "toys.make_norm", "name": "bn"}}
        )
        assert make().norm(3) == ("bn", 3)

    def test_plain_containers_are_copied(self) -> None:
        config = {"a": [1, {"b": None}], "c": "text"}
        built = instantiate(config)
        assert built == config
        built["a"][1]["b"] = 3
        assert config["a"][1] == {"b": None}

    def test_a_dict_config_with_interpolations(self) -> None:
        config = OmegaConf.create(
            {"depth": 34, "kind": "Net", "model": {"_target_": "toys.${kind}", "depth": "${depth}"}}
        )
        assert instantiate(config)["model"].depth == 34
        assert instantiate(config.model).depth == 34

    def test_torch_optimizer(self) -> None:
        make = instantiate({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5})
        assert make([torch.zeros(1, requires_grad=True)]).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("node", "message"),
    {
        "near": (
            {"_target_": "toys.net"},
            "m._target_=toys.net: not an allowed name; did you mean toys.Net?",
        ),
        "last part": (
            {"_target_": "sgd"},
            "m._target_=sgd: not an allowed name; did you mean torch.optim.SGD?",
        ),
        "far": (
            {"_target_": "x.y"},
            "m._target_=x.y: not an allowed name (see bcos_train.config.TARGETS",
        ),
        "no text": ({"_target_": 3}, "m._target_=3: not an allowed name"),
        "list": ({"_target_": ["toys.Net"]}, "m._target_=['toys.Net']: not an allowed name"),
        "in a list": ({"a": [1, {"_target_": "os.system"}]}, "m.a.1._target_=os.system: not an allowed name"),
        "args": ({"_target_": "toys.Net", "_args_": [3]}, "m._args_: not supported; arguments are given by name"),
        "hydra's": ({"_target_": "toys.Net", "_recursive_": False}, "m._recursive_: not supported"),
        "partial": ({"_target_": "toys.Net", "_partial_": "yes"}, "m._partial_=yes: expected true or false"),
        "missing": ({"_target_": "toys.Net", "depth": "???"}, "m.depth: needs a value: add m.depth=…"),
        "value": ({"_target_": "toys.Brittle"}, "m: depth must be 18, 34 or 50, not 19"),
        "file": ({"a": {"_target_": "toys.Brittle", "error": "file"}}, "m.a: no such folder: /data"),
        "lost": (OmegaConf.create({"a": {"b": "${nope}"}}), "m.a.b: Interpolation key 'nope' not found"),
        "loop": (OmegaConf.create({"a": {"b": "${a.b}"}}), "m.a.b: Recursive interpolation detected"),
        "variable": (OmegaConf.create({"a": "${oc.env:NOPE_}"}), "m.a: Environment variable 'NOPE_' not found"),
        "of missing": (OmegaConf.create({"a": "???", "b": "${a}"}), "m.b: needs a, which has no value"),
    }.values(),
)
def test_messages(node: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        instantiate(node, path="m")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        instantiate({"_target_": "toys.Brittle", "error": "bug"})


class Canary:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def hostile(tmp_path: Path, mark: Path) -> dict[str, dict[str, Any]]:
    pickled, module, command = tmp_path / "weights.pt", tmp_path / "hub", f"touch {mark}"
    torch.save(Canary(mark), pickled)
    module.mkdir()
    (module / "hubconf.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef model(): pass\n")
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Net: pass\n")
    return {
        "torch.load": {"_target_": "torch.load", "f": str(pickled), "weights_only": False},
        "collect_env": {"_target_": "torch.utils.collect_env.run", "command": command},
        "hub": {"_target_": "torch.hub.load", "repo_or_dir": str(module), "model": "model", "source": "local"},
        "gopen": {"_target_": "webdataset.gopen", "url": f"pipe:{command}"},
        "system": {"_target_": "os.system", "command": command},
        "eval": {"_target_": "builtins.eval", "_args_": [f"open({str(mark)!r}, 'w')"]},
        "open": {"_target_": "builtins.open", "file": str(mark), "mode": "w"},
        "import": {"_target_": "evil.Net"},
        "through a target": {"_target_": "toys.Net.__init__.__globals__", "x": 1},
        "space": {"_target_": "toys.Net ", "depth": 1},
        "hydra": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", "command": command}},
    }


PLACES = {
    "alone": lambda node: node,
    "in a list": lambda node: {"a": [[node]]},
    "partial": lambda node: {**node, "_partial_": True},
    "within a partial node": lambda node: {"_target_": "toys.Net", "_partial_": True, "norm": node},
    "after a good node": lambda node: {"good": {"_target_": "toys.Net"}, "bad": node},
    "by interpolation": lambda node: OmegaConf.create({"name": node["_target_"], "m": {**node, "_target_": "${name}"}}),
    "by a node's interpolation": lambda node: OmegaConf.create(
        {"evil": node, "m": {"_target_": "toys.Net", "norm": "${evil}"}}
    ),
}
ATTACKS = ["torch.load", "collect_env", "hub", "gopen", "system", "eval", "open", "import", "through a target", "space"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", [*ATTACKS, "hydra"])
def test_a_hostile_config_runs_nothing(
    attack: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.syspath_prepend(tmp_path)
    config = PLACES[place](hostile(tmp_path, mark)[attack])
    with pytest.raises(UserError, match="not an allowed name"):
        instantiate(config)
    assert any("not an allowed name" in problem.text for problem in check(config))
    assert toys.CALLS == []
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_the_canary_detects_execution(tmp_path: Path) -> None:
    """The attacks do work on what they aim at."""
    mark = tmp_path / "mark"
    node = hostile(tmp_path, mark)["torch.load"]
    torch.load(node["f"], weights_only=False)
    assert mark.exists()
