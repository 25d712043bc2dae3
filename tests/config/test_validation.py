from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pytest
import toys
from omegaconf import OmegaConf

from bcos_train.config import Problem, check
from bcos_train.config.annotations import is_compatible


def net(**options: Any) -> dict[str, Any]:
    return {"_target_": "toys.Net", **options}


def shards(**options: Any) -> dict[str, Any]:
    return {"_target_": "toys.Shards", "root": "/data", **options}


AUGMENT = {"_target_": "toys.Augment", "size": 32}
RIGHT = {
    "nothing": {},
    "defaults": net(),
    "whole number for a number": net(b=2),
    "text in a union": net(norm="bn"),
    "function in a union": net(norm={"_target_": "toys.make_norm", "name": "bn"}),
    "partial node for a function": net(norm={"_target_": "toys.Net", "_partial_": True}),
    "list for a tuple": {"_target_": "toys.Augment", "size": [8, 9]},
    "bounds": {"_target_": "toys.Augment", "size": 8, "scale": 1},
    "partial without params": {"_target_": "toys.Adam", "_partial_": True, "lr": 1e-3, "betas": [0, 1]},
    "null": shards(augment=None),
    "choice": shards(mode="val"),
    "mapping": shards(weights={"a": 1, "b": 0.5}),
    "node in a list": shards(transforms=["flip", AUGMENT]),
    "node": shards(augment=AUGMENT),
    "not a number": net(b=float("nan")),
    "hook": {"_target_": "toys.create_net", "name": "bignet", "depth": 3},
    "named keys of an open end": {"_target_": "toys.Open", "a": 3},
    "torch": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1, "betas": [0.9, 0.99], "fused": None},
}


@pytest.mark.parametrize("node", RIGHT.values(), ids=RIGHT)
def test_right(node: dict[str, Any]) -> None:
    assert check(node, path="x") == []
    assert toys.CALLS == []


KEYS = "(allowed: depth, norm, b)"
NODE = "(a node with _target_)"
WRONG = {
    "unknown key": (net(dept=18), [f"x.dept=18: unknown key; did you mean depth? {KEYS}"]),
    "far key": (net(zzz=1), [f"x.zzz=1: unknown key {KEYS}"]),
    "text for a number": (net(b="abc"), ["x.b=abc: expected a number"]),
    "digits for a number": (net(depth="3"), ["x.depth=3: expected a whole number"]),
    "true for a number": (net(depth=True), ["x.depth=true: expected a whole number"]),
    "fraction for a whole number": (net(depth=1.5), ["x.depth=1.5: expected a whole number"]),
    "null": (net(b=None), ["x.b=null: expected a number"]),
    "list": (net(b=[1]), ["x.b=[1]: expected a number"]),
    "mapping": (net(b={"c": 1}), ['x.b={"c": 1}: expected a number']),
    "whole number for true": ({"_target_": "toys.Logger", "verbose": 1}, ["x.verbose=1: expected true or false"]),
    "union": (net(norm=3), ["x.norm=3: expected text"]),
    "choice": (shards(mode="trian"), ["x.mode=trian: expected train or val; did you mean train?"]),
    "far choice": (shards(mode=3), ["x.mode=3: expected train or val"]),
    "bounds": ({**AUGMENT, "scale": 0}, ["x.scale=0: expected greater than 0"]),
    "bounded type": ({**AUGMENT, "scale": "a"}, ["x.scale=a: expected a number"]),
    "tuple length": (
        {**AUGMENT, "size": [1]},
        ["x.size=[1]: expected a whole number or [a whole number, a whole number]"],
    ),
    "tuple item": ({**AUGMENT, "size": [1, "a"]}, ["x.size.1=a: expected a whole number"]),
    "mapping item": (shards(weights={"a": "b"}), ["x.weights.a=b: expected a number"]),
    "list item": (shards(transforms=["a", 3]), ["x.transforms.1=3: expected text"]),
    "text for a list": (shards(transforms="flip"), ["x.transforms=flip: expected a list of text"]),
    "text for a node": (shards(augment="big"), [f"x.augment=big: expected Augment {NODE} or null"]),
    "wrong node": (shards(augment=net()), [f"x.augment: expected Augment {NODE} or null, but toys.Net returns Net"]),
    "node for text": (shards(root=net()), ["x.root: expected text or a path, but toys.Net returns Net"]),
    "partial for an object": (
        shards(augment={**AUGMENT, "_partial_": True}),
        [f"x.augment: expected Augment {NODE} or null, but toys.Augment returns a function; remove _partial_"],
    ),
    "object for a function": (
        net(norm=AUGMENT),
        [
            "x.norm: expected text or a function (a node with _target_), "
            "but toys.Augment returns Augment; add _partial_: true"
        ],
    ),
    "missing": ({"_target_": "toys.Shards"}, ["x.root: needs a value (text or a path): add x.root=…"]),
    "missing for code": ({"_target_": "toys.Adam", "lr": 1}, ["x.params: needs a value: add x.params=…"]),
    "open value": (net(b="???"), ["x.b: needs a value (a number): add x.b=…"]),
    "positional": (net(_args_=[1]), ["x._args_: not supported; arguments are given by name"]),
    "partial": (net(_partial_="yes"), ["x._partial_=yes: expected true or false"]),
    "swallowed key": ({"_target_": "toys.Open", "pading": 1}, ["x.pading=1: unknown key (allowed: a)"]),
    "hook's value": (
        {"_target_": "toys.create_net", "name": "nett"},
        ["x.name=nett: unknown model; did you mean bignet?"],
    ),
    "hook's key": (
        {"_target_": "toys.create_net", "name": "net", "dept": 1},
        ["x.dept=1: unknown key; did you mean depth? (allowed: name, depth, norm, b)"],
    ),
    "hook's missing key": ({"_target_": "toys.create_net"}, ["x.name: needs a value (text): add x.name=…"]),
    "long value": (net(b="a" * 99), [f"x.b={'a' * 57}...: expected a number"]),
    "deep": (
        {"a": [{"b": shards(augment={**AUGMENT, "siz": 3})}]},
        ["x.a.0.b.augment.siz=3: unknown key; did you mean size? (allowed: size, scale)"],
    ),
    "below an unknown key": (
        net(zzz={"_target_": "os.system"}),
        [
            f'x.zzz={{"_target_": "os.system"}}: unknown key {KEYS}',
            "x.zzz._target_=os.system: not an allowed name (see bcos_train.config.TARGETS)",
        ],
    ),
    "all at once": (
        shards(mode=1, augment={**AUGMENT, "scale": 2}, weights=[1], rot="a"),
        [
            "x.mode=1: expected train or val",
            "x.augment.scale=2: expected less than or equal to 1",
            "x.weights=[1]: expected a mapping or null",
            "x.rot=a: unknown key; did you mean root? (allowed: root, augment, mode, weights, transforms)",
        ],
    ),
}


@pytest.mark.parametrize(("node", "messages"), WRONG.values(), ids=WRONG)
def test_wrong(node: dict[str, Any], messages: list[str]) -> None:
    assert [str(problem) for problem in check(node, path="x")] == messages
    assert toys.CALLS == []


class TestRoot:
    RIGHT: Mapping[str, Any] = {
        "model": net(),
        "optimizer": {"_target_": "toys.Adam", "_partial_": True, "lr": 0.1},
        "dataset": shards(),
    }

    def test_right(self) -> None:
        assert check(self.RIGHT, root=toys.train) == []
        everything = {"seed": 3, "devices": "auto", "name": None, "loggers": [{"_target_": "toys.Logger"}]}
        assert check({**self.RIGHT, **everything, "trainer": {"a": 1, "b": net()}}, root=toys.train) == []

    def test_keys_are_parameters(self) -> None:
        problems = check({**self.RIGHT, "sed": 3, "trainer": {"b": net(dept=1)}}, root=toys.train)
        allowed = "(allowed: model, optimizer, dataset, seed, name, devices, loggers, trainer, plugins)"
        assert [str(problem) for problem in problems] == [
            f"sed=3: unknown key; did you mean seed? {allowed}",
            f"trainer.b.dept=1: unknown key; did you mean depth? {KEYS}",
        ]

    def test_values(self) -> None:
        wrong = {"model": AUGMENT, "optimizer": {"_target_": "toys.Net", "_partial_": True}, "devices": "all"}
        assert [str(problem) for problem in check(wrong, root=toys.train)] == [
            f"model: expected Net {NODE}, but toys.Augment returns Augment",
            "optimizer: expected a function that returns Adam (a node with _target_), but toys.Net returns a function",
            "devices=all: expected a whole number or auto",
            "dataset: needs a value: add dataset=…",
        ]

    def test_a_composed_config(self) -> None:
        config = OmegaConf.create({**self.RIGHT, "seed": "${model.depth}", "hydra": {"x": "${nope}"}})
        config.model.depth = "abc"
        assert [problem.path for problem in check(config, root=toys.train)] == ["model.depth", "seed"]

    def test_an_interpolation_that_leads_nowhere(self) -> None:
        assert check(OmegaConf.create({"a": {"b": "${nope}"}})) == [
            Problem("a.b", "Interpolation key 'nope' not found")
        ]


@pytest.mark.parametrize(
    ("result", "annotation", "is_partial", "expected"),
    [
        (toys.BigNet, toys.Net, False, True),
        (toys.Net, toys.BigNet, False, True),  # annotated with the base class
        (toys.Net, toys.Adam, False, False),
        (toys.Net, Any, False, True),
        (Any, toys.Net, False, True),
        (toys.Net | None, toys.Net, False, True),
        (toys.Net | toys.Adam, toys.Logger, False, False),
        (toys.Net, Callable[..., Any], False, False),
        (Callable[[int], Any], Callable[..., Any], False, True),
        (toys.Net, Callable[..., toys.Net], True, True),
        (toys.Net, Callable[..., toys.Adam], True, False),
        (toys.Net, Callable[..., toys.Adam | toys.Net], True, True),
        (toys.Net, Callable, True, True),
        (toys.Net, toys.Net, True, False),
        (toys.Net, partial, True, True),
        (toys.Net, Mapping[str, Any], False, True),
        (toys.Net, Sequence[int], False, False),
        (toys.Net, float, False, False),
        (toys.Net, Literal["a"], False, False),
        (list[int], Sequence[int], False, True),
    ],
)
def test_is_compatible(result: Any, annotation: Any, is_partial: bool, expected: bool) -> None:
    assert is_compatible(result, annotation, is_partial) is expected


def test_choices_spelled_in_two_ways_are_listed_once() -> None:
    def root(precision: Literal[32, 16, "32", "16", "bf16"]) -> None: ...

    (problem,) = check({"precision": "16-mixed"}, root=root)
    assert str(problem) == "precision=16-mixed: expected 32, 16 or bf16; did you mean 16?"
