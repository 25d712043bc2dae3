"""The shape of the project: who may import whom, and how large things may grow."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "bcos_train"
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("scripts/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]
TESTS = sorted(ROOT.glob("tests/**/*.py"))

#: Packages of ours that a package may import; the others are free. The modules below are for all.
ALLOWED = {
    "nn": set(),
    "explanation": {"nn"},
    "model": {"explanation", "nn"},
    "runs": set(),
    "weights": {"explanation", "model", "nn", "runs"},
    "integrations": {"explanation", "model", "nn", "weights"},
    "metric": {"explanation", "nn"},
    "evaluation": {"explanation", "metric", "model", "report", "weights"},
    "distillation": {"explanation", "model", "nn", "weights"},
    "guidance": {"explanation"},
    "task": {"distillation", "explanation", "guidance", "loss", "nn"},
    "loss": set(),
    "optimizer": set(),
    "schedule": set(),
    "augmentation": set(),
    "dataset": set(),
    "config": {"model"},
}
FOR_ALL = {
    f"bcos_train.utils.{name}"
    for name in (
        "atomic",
        "files",
        "command_line",
        "compiling",
        "console",
        "cores",
        "json_types",
        "progress",
        "substitutes",
        "suggestions",
        "terminal",
    )
}
#: Modules that a package may import although the rest of their package is out of reach for it.
ALLOWED_MODULES = {
    "model": ("bcos_train.augmentation", "bcos_train.dataset.encoding", "bcos_train.dataset.image"),
    "evaluation": ("bcos_train.loading", "bcos_train.runs.layout"),
    "distillation": ("bcos_train.dataset.encoding", "bcos_train.loading"),
    "task": ("bcos_train.dataset.randomness",),
    "config": ("bcos_train.runs.launcher",),
}
#: Packages that never see Lightning, Hydra or OmegaConf.
PURE = {
    "nn",
    "explanation",
    "model",
    "weights",
    "integrations",
    "metric",
    "evaluation",
    "runs",
    "distillation",
    "guidance",
    "task",
    "loss",
    "optimizer",
    "schedule",
}
FRAMEWORKS = {"pytorch_lightning", "lightning", "hydra", "omegaconf"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module_name(path): path for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, deep: bool) -> Iterator[ast.stmt]:
    """All import statements, without those for type checkers; ``deep``: also those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not is_type_checking(child) and (deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from statements(child, deep)


def imports(path: Path, deep: bool = True) -> set[str]:
    """Absolute names of all that a file imports: of ``from a import b`` the module ``a.b`` if it is one, else ``a``."""
    found: set[str] = set()
    for node in statements(tree(path), deep):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in MODULES} | ({module} if inner - set(MODULES) else set())
    return found


def package_of(module: str) -> str | None:
    """``bcos_train.nn.conv`` -> ``nn``; None for modules at the top and for other distributions."""
    parts = module.split(".")
    return parts[1] if parts[0] == "bcos_train" and len(parts) > 1 and parts[1] in PACKAGES else None


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if package_of(module_name(path)) == package]


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    assert files_of(package), "no such package"
    modules = ALLOWED_MODULES.get(package, ())
    for path in files_of(package):
        for name in imports(path):
            other = package_of(name)
            if any(name == module or name.startswith(f"{module}.") for module in modules):
                continue
            if name.startswith("bcos_train"):
                assert name in FOR_ALL or other in {package, *ALLOWED[package]}, f"{path}: {name}"


@pytest.mark.parametrize("package", sorted(PURE))
def test_pure_packages_see_no_framework(package: str) -> None:
    for path in files_of(package):
        assert {name.split(".")[0] for name in imports(path)} & FRAMEWORKS == set(), path


def test_only_config_sees_hydra_and_omegaconf() -> None:
    users = {
        package_of(module)
        for module, path in MODULES.items()
        if {name.split(".")[0] for name in imports(path)} & {"hydra", "omegaconf"}
    }
    assert users == {"config"}
    hydra = [module for module, path in MODULES.items() if "hydra" in {name.split(".")[0] for name in imports(path)}]
    assert hydra == ["bcos_train.config.composition", "bcos_train.config.hydra_loader"]
    named = [path for path in FILES if "DictConfig" in path.read_text() and "config" not in path.parts]
    assert named == []


def test_only_the_commands_import_the_wiring() -> None:
    users = [module for module, path in MODULES.items() if "bcos_train.run" in imports(path)]
    assert users == ["bcos_train.commands"]


def test_the_official_code_is_a_test_dependency_only() -> None:
    for path in FILES:
        assert "bcos" not in {name.split(".")[0] for name in imports(path)}, path


def order(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_circle_among_modules() -> None:
    """Imports at the top of modules; a package's own __init__ runs before its modules and gathers them."""
    pytest.importorskip("bcos_train.nn.fast")  # which nn/backend.py names even where it is missing
    graph = {
        module: {name for name in imports(path, deep=False) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    order(graph)


def test_no_circle_among_packages() -> None:
    graph: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for module, path in MODULES.items():
        package = package_of(module)
        if package is not None:
            graph[package] |= {other for name in imports(path) if (other := package_of(name))} - {package}
    order(graph)


def test_the_check_for_circles_finds_one() -> None:
    with pytest.raises(pytest.fail.Exception, match="a"):
        order({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_at_most_three_levels_of_folders() -> None:
    deep = {path.parent for path in FILES if len(path.parent.relative_to(SRC).parts) > 3}
    assert deep == set()


def test_config_groups_are_named_as_packages() -> None:
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    # These configure something that has no package of its own.
    assert groups - {"recipe", "trainer", "logger", "hydra"} <= set(PACKAGES)


def test_tests_mirror_the_packages() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(PACKAGES) <= folders, "a package without tests"


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_at_most_60_lines(path: Path) -> None:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    too_long = {f"{node.name}:{node.lineno}": length(node) for node in functions if length(node) > 60}
    assert too_long == {}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_entry_points_are_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


#: What may be imported without the training dependencies.
LIGHT = [
    "bcos_train",
    *(f"bcos_train.{name}" for name in ("nn", "model", "weights", "explanation", "loss", "schedule")),
]


def test_light_packages_load_no_framework() -> None:
    code = f"""
import sys
import tomllib
import {", ".join(LIGHT)}
heavy = ("pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb", "pydantic", "sklearn", "timm", "safetensors")
print(*[name for name in heavy if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == []


def test_light_packages_need_the_basic_dependencies_only() -> None:
    """What ``pip install bcos-train`` installs, without extras; torchvision brings Pillow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    basic = {re.split("[<>=!]", requirement)[0] for requirement in project["dependencies"]} | {"PIL", "bcos_train"}
    code = f"""
import builtins, sys
original = builtins.__import__
def checked(name, globals=None, *args, **kwargs):
    top = name.partition(".")[0]
    if globals and str(globals.get("__name__")).startswith("bcos_train"):
        if top not in {basic!r} and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{{globals['__name__']}} imports {{name}}")
    return original(name, globals, *args, **kwargs)
builtins.__import__ = checked
import {", ".join(LIGHT)}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr.splitlines()[-1]


def test_oldest_requirements_are_the_lower_bounds() -> None:
    bounds = dict(
        requirement.partition(",")[0].split(">=")
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    pins = [line.split("==") for line in (ROOT / "requirements-oldest.txt").read_text().splitlines() if "==" in line]
    assert [name for name, _ in pins] == ["torch", "torchvision"]
    for name, version in pins:
        assert version == f"{bounds[name]}.0"
