"""Small targets that configs in these tests name, the configs, and a command that uses them."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt, Le

from bcos_train.config import targets
from bcos_train.config.cli import entry_point

#: Everything that was built or called, in order.
CALLS: list[str] = []

NAMES = ("Adam", "Augment", "Brittle", "Logger", "Net", "Open", "Shards", "create_net", "make_norm", "needs_absent")
TARGETS = tuple(f"toys.{name}" for name in NAMES)
#: Set for processes that these tests start: this module then adds its own targets to the list.
ALLOW = "BCOS_TRAIN_TESTS_ALLOW_TOYS"
if ALLOW in os.environ:
    targets.TARGETS = (*TARGETS, *targets.TARGETS)


class Net:
    def __init__(self, depth: int = 18, norm: str | Callable[[int], Any] = "bn", b: float = 2.0) -> None:
        CALLS.append("Net")
        self.depth, self.norm, self.b = depth, norm, b


class BigNet(Net):
    pass


class Augment:
    def __init__(self, size: int | tuple[int, int], scale: Annotated[float, Gt(0), Le(1)] = 1.0) -> None:
        CALLS.append("Augment")
        self.size, self.scale = size, scale


class Shards:
    def __init__(
        self,
        root: str | Path,
        augment: Augment | None = None,
        mode: Literal["train", "val"] = "train",
        weights: dict[str, float] | None = None,
        transforms: Sequence[Augment | str] = (),
    ) -> None:
        CALLS.append("Shards")
        self.root, self.augment, self.mode, self.weights, self.transforms = root, augment, mode, weights, transforms


class Adam:
    def __init__(self, params: list[float], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        CALLS.append("Adam")
        self.params, self.lr, self.betas = params, lr, betas


class Logger:
    def __init__(self, verbose: bool = False) -> None:
        CALLS.append("Logger")


class Brittle:
    """Fails while it is built, in the way the config says."""

    def __init__(self, error: Literal["value", "file", "bug"] = "value") -> None:
        if error == "value":
            raise ValueError("depth must be 18, 34 or 50,\n not 19")
        if error == "file":
            raise FileNotFoundError("no such folder: /data")
        raise RuntimeError("a bug")


class Open:
    def __init__(self, a: int = 0, **kwargs: int) -> None:
        self.a = a


def make_norm(name: str) -> Callable[[int], Any]:
    return lambda width: (name, width)


def create_net(name: str, **options: Any) -> Net:
    """A callable whose keywords depend on the name."""
    CALLS.append("create_net")
    return Net(**options) if name == "net" else BigNet(**options)


def _config_signature(node: Mapping[str, Any]) -> inspect.Signature:
    if node.get("name", "net") not in ("net", "bignet"):
        raise ValueError("unknown model; did you mean bignet?")
    parameters = [*inspect.signature(create_net).parameters.values()][:1]
    return inspect.Signature([*parameters, *inspect.signature(Net).parameters.values()])


create_net.config_signature = _config_signature  # type: ignore[attr-defined]


def train(
    model: Net,
    optimizer: Callable[..., Adam],
    dataset: Shards,
    seed: int = 0,
    name: str | None = None,
    devices: int | Literal["auto"] = "auto",
    loggers: Sequence[Logger] = (),
    trainer: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
) -> None:
    """The root: its parameters are the top-level keys."""


CONFIGS = {
    "train.yaml": """
defaults:
  - _self_
  - optimizer: adam
  - dataset: digits
  - model: resnet18
  - recipe: null
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
seed: 0
name: ${hydra:runtime.choices.model}
hydra:
  run: {dir: .}
  sweep: {dir: sweeps, subdir: .}
  output_subdir: null
  job: {chdir: false}
""",
    "model/resnet18.yaml": "{_target_: toys.Net, depth: 18}",
    "model/resnet50.yaml": """# @package _global_
defaults:
  - override /optimizer: slow
model: {_target_: toys.Net, depth: 50}
""",
    "model/net.yaml": "{_target_: toys.create_net, name: net}",
    "model/broken.yaml": "{_target_: [",
    "extra/one.yaml": "a: 1",
    "extra/none.yaml": "{}",
    "optimizer/adam.yaml": "{_target_: toys.Adam, _partial_: true, lr: 0.1}",
    "optimizer/slow.yaml": "{_target_: toys.Adam, _partial_: true, lr: 0.01}",
    "dataset/digits.yaml": "{_target_: toys.Shards, root: /data/digits}",
    "dataset/cifar10.yaml": "{_target_: toys.Shards, root: /data/cifar}",
    "recipe/long.yaml": "# @package _global_\nseed: 7",
    "recipe/cifar10/short.yaml": "# @package _global_\nseed: 8",
    "recipe/sweep.yaml": "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2,3'}}}",
}


def write_configs(folder: Path, extra: Mapping[str, str] | None = None) -> Path:
    for name, text in {**CONFIGS, **(extra or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


class Command:
    """An entry point in this process: exit code, output, and the configs that ``main`` received."""

    def __init__(self, configs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.configs, self.monkeypatch, self.capsys = configs, monkeypatch, capsys
        self.seen: list[dict[str, Any]] = []
        self.outcome: int | Exception | None = None

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            entry_point(config_name="train", root=train, config_dir=self.configs)(self.main)()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0  # type: ignore[assignment]
        self.printed, err = self.capsys.readouterr()
        return code, err

    def main(self, config: dict[str, Any]) -> int | None:
        self.seen.append(config)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome
