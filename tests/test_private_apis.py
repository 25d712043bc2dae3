"""Private APIs of dependencies: the table of CONTRIBUTING.md is complete, and each of them does what it is used for."""

import argparse
import ast
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from bcos_train.config.composition import Composer, project_config_dir

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text().partition("## Private APIs in use")[2]
NAMES = re.findall(r"^\| `([\w.]+)`", TABLE, re.MULTILINE)


def resolve(name: str) -> Any:
    """The object of a dotted name, importing as many of its parts as are modules."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            # Some attributes are set in the constructor.
            found = getattr(found if hasattr(found, part) else found(), part)
        return found
    raise ModuleNotFoundError(name)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(path: Path) -> set[str]:
    """Private names of other distributions that a file imports, or reaches through ``torch.``."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and (text := ast.unparse(node)).startswith("torch._C."):
            found.add(text)
    return {name for name in found if is_private(name) and not name.startswith("bcos_train")}


def defined_names(path: Path) -> set[str]:
    """Names of functions and classes, and variables and attributes that are assigned to."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_attributes(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if is_private(node.attr)}


def test_the_table_is_complete() -> None:
    paths = list((ROOT / "src").rglob("*.py"))
    used = set().union(*(private_names(path) for path in paths))
    assert {name for name in used if name not in NAMES} == set()
    attributes = set().union(*map(private_attributes, paths)) - set().union(*map(defined_names, paths))
    # Public in spite of its name, and Hydra's keys.
    attributes -= {"_exit", "_target_"}
    assert attributes <= {part for name in NAMES for part in name.split(".")}


@pytest.mark.parametrize("name", NAMES)
def test_it_exists(name: str) -> None:
    resolve(name)


def hydra_composes() -> None:
    """All four of Hydra's."""
    composer = Composer(project_config_dir())
    assert composer.compose("train", ["seed=3"])["seed"] == 3
    assert composer.jobs("train", ["seed=1,2"]) == [["seed=1"], ["seed=2"]]


def a_call_can_be_compiled() -> None:
    module, x, calls = nn.Linear(2, 1), torch.rand(3, 2), []
    module._compiled_call_impl = lambda *args: calls.append(1) or module._call_impl(*args)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    assert calls == [1]


def compilation_has_limits() -> None:
    config = resolve("torch._dynamo.config")
    assert config.recompile_limit > 0
    assert isinstance(config.optimize_ddp, bool | str)


def modules_keep_hooks() -> None:
    module = nn.Linear(1, 1)
    kinds = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    dicts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for kind, name in zip(kinds, dicts, strict=True):
        assert not getattr(module, name)
        getattr(module, f"register_{kind}")(lambda *_: None)
        assert len(getattr(module, name)) == 1


def onednn_multiplies() -> None:
    x, weight = torch.rand(2, 3, 4), torch.rand(5, 4)
    if torch.backends.mkldnn.is_available():
        out = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        torch.testing.assert_close(out, F.linear(x, weight))


def several_tensors_are_copied() -> None:
    sources, targets = [torch.rand(2), torch.rand(3)], [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(targets, sources)
    assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))


def lightning_asks_for_the_signal() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)


def parsers_list_their_options() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--size")
    assert [action.option_strings for action in parser._actions] == [["--size"]]


def transforms_are_seen() -> None:
    active = resolve("torch._C._are_functorch_transforms_active")
    seen = []
    torch.func.vmap(lambda x: seen.append(active()) or x)(torch.zeros(2))
    assert (seen, active()) == ([True], False)


def dispatch_modes_are_seen() -> None:
    depth = resolve("torch._C._len_torch_dispatch_stack")
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert depth() > 0
    assert depth() == 0


def forward_mode_is_seen() -> None:
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


def global_hooks_are_seen() -> None:
    has_any = resolve("torch.nn.modules.module._has_any_global_hook")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert has_any()
    finally:
        handle.remove()
    assert not has_any()


def convolutions_take_a_weight() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False)
    x = torch.rand(1, 2, 5, 5)
    assert torch.equal(conv._conv_forward(x, conv.weight, None), conv(x))


def versions_count_writes() -> None:
    x = torch.zeros(2)
    counter = x.detach()
    counter.data = x.new_empty(0)
    assert counter._version == 0
    x += 1
    assert counter._version == x._version == 1


def parts_are_dicts() -> None:
    assert set(nn.Sequential(nn.ReLU())._modules) == {"0"}
    assert set(nn.BatchNorm2d(2)._buffers) == {"running_mean", "running_var", "num_batches_tracked"}


def imagenet_has_its_names() -> None:
    assert len(resolve("torchvision.models._meta._IMAGENET_CATEGORIES")) == 1000


@pytest.mark.parametrize(
    "smoke",
    [
        hydra_composes,
        a_call_can_be_compiled,
        compilation_has_limits,
        modules_keep_hooks,
        onednn_multiplies,
        several_tensors_are_copied,
        lightning_asks_for_the_signal,
        parsers_list_their_options,
        transforms_are_seen,
        dispatch_modes_are_seen,
        forward_mode_is_seen,
        global_hooks_are_seen,
        convolutions_take_a_weight,
        versions_count_writes,
        parts_are_dicts,
        imagenet_has_its_names,
    ],
)
def test_it_works(smoke: Callable[[], None]) -> None:
    smoke()
