"""Private APIs of dependencies: the table of CONTRIBUTING.md is complete, and each of them does what it is used for."""

import ast
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
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
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(path: Path) -> set[str]:
    """Private names of other distributions that a file imports, or reaches through ``torch.``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and (text := ast.unparse(node)).startswith("torch._C."):
            found.add(text)
    return {name for name in found if is_private(name) and not name.startswith("bcos_train")}


def test_the_table_is_complete() -> None:
    used = set().union(*(private_names(path) for path in (ROOT / "src").rglob("*.py")))
    assert {name for name in used if name not in NAMES} == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch.nn.Module._buffers"])
def test_it_exists(name: str) -> None:
    assert resolve(name) is not None


def hydra_composes() -> None:
    """All four of Hydra's."""
    composer = Composer(project_config_dir())
    assert composer.compose("train", ["seed=3"])["seed"] == 3
    assert composer.jobs("train", ["seed=1,2"]) == [["seed=1"], ["seed=2"]]


def compiled_models_are_recognized() -> None:
    assert isinstance(torch.compile(nn.Linear(1, 1)), resolve("torch._dynamo.OptimizedModule"))


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


def buffers_are_a_dict() -> None:
    assert set(nn.BatchNorm2d(2)._buffers) == {"running_mean", "running_var", "num_batches_tracked"}


def imagenet_has_its_names() -> None:
    assert len(resolve("torchvision.models._meta._IMAGENET_CATEGORIES")) == 1000


@pytest.mark.parametrize(
    "smoke",
    [
        hydra_composes,
        compiled_models_are_recognized,
        transforms_are_seen,
        dispatch_modes_are_seen,
        forward_mode_is_seen,
        global_hooks_are_seen,
        convolutions_take_a_weight,
        buffers_are_a_dict,
        imagenet_has_its_names,
    ],
)
def test_it_works(smoke: Callable[[], None]) -> None:
    smoke()
