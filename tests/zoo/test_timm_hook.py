"""Registration in timm, whichever package is imported first. Each case has a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bcos_train.zoo import timm_hook


def python(code: str, path: Path | None = None) -> list[str]:
    """The lines that the code prints. Warnings are errors, but for those that it catches."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-W", "error:::bcos_train", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


COUNT = "print(len(timm.list_models('bcos_*')) > 50, timm.is_model('standard_vitc_ti_patch1_14'))"


def test_timm_after_bcos_train() -> None:
    code = f"""
import importlib, importlib.util, sys
import bcos_train
print("timm" in sys.modules, importlib.util.find_spec("timm") is not None, "timm" in sys.modules)
from timm.data import create_transform
import timm
{COUNT}
print(any("bcos_train" in type(finder).__module__ for finder in sys.meta_path))
print(type(timm.__loader__).__name__, type(timm.__spec__.loader).__name__)
print(timm.create_model("bcos_resnet20").num_classes)
importlib.reload(timm)
{COUNT}
"""
    whole = "True True"
    assert python(code) == ["False True False", whole, "False", "SourceFileLoader SourceFileLoader", "10", whole]


def test_timm_before_bcos_train() -> None:
    code = f"""
import sys
from timm.models import create_model
import timm
print(timm.list_models("bcos_*"))
import bcos_train
{COUNT}
print(any("bcos_train" in type(finder).__module__ for finder in sys.meta_path))
"""
    assert python(code) == ["[]", "True True", "False"]


# ---- the mechanism, beside a small package that is called timm


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A timm of two modules, and of this package the hook with something to register."""
    zoo = tmp_path / "bcos_train" / "zoo"
    for folder in (tmp_path / "timm", zoo):
        folder.mkdir(parents=True)
    (zoo.parent / "__init__.py").touch()
    (zoo / "__init__.py").write_text("from bcos_train.zoo.timm_hook import register_in_timm\nregister_in_timm()\n")
    shutil.copy(timm_hook.__file__, zoo)
    (zoo / "timm_models.py").write_text("import timm.data\ntimm.registered.append('bcos')\n")
    (tmp_path / "timm" / "__init__.py").write_text("from timm import data\nregistered = []\n")
    (tmp_path / "timm" / "data.py").write_text("size = 224\n")
    return tmp_path


OURS = "print([type(f).__name__ for f in sys.meta_path if 'bcos_train' in type(f).__module__])"


@pytest.mark.parametrize(
    "imports",
    [
        "import bcos_train.zoo, timm",
        "import timm, bcos_train.zoo",
        "import bcos_train.zoo, timm.data; import timm",
        "import bcos_train.zoo; from timm.data import size; import timm",
        "from timm.data import size; import bcos_train.zoo, timm",
        "import importlib, bcos_train.zoo; timm = importlib.import_module('timm')",
        "import importlib, bcos_train.zoo; importlib.reload(bcos_train.zoo); import timm",
        "import importlib, bcos_train.zoo, timm; importlib.reload(bcos_train.zoo)",
        "import bcos_train.zoo, importlib.util as u; u.find_spec('timm'); u.find_spec('timm'); import timm",
    ],
)
def test_registered_once(imports: str, packages: Path) -> None:
    assert python(f"import sys; {imports}; print(timm.registered); {OURS}", packages) == ["['bcos']", "[]"]


def test_not_before_timm_is_imported(packages: Path) -> None:
    code = f"import sys, bcos_train.zoo, json; print('timm' in sys.modules); {OURS}"
    assert python(code, packages) == ["False", "['_TimmFinder']"]


def test_without_timm(packages: Path) -> None:
    shutil.rmtree(packages / "timm")
    code = """
import bcos_train.zoo, sys
from importlib.machinery import PathFinder
sys.path = [path for path in sys.path if "site-packages" not in path]
try:
    import timm
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code, packages) == ["No module named 'timm'"]


def test_where_timm_is_forbidden(packages: Path) -> None:
    code = """
import sys
sys.modules["timm"] = None
import bcos_train.zoo
try:
    import timm
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code, packages) == ["import of timm halted; None in sys.modules"]


def test_timm_that_fails_to_import_first(packages: Path) -> None:
    init = packages / "timm" / "__init__.py"
    good = init.read_text()
    init.write_text("import no_such_module\n")
    code = f"""
import sys, bcos_train.zoo
from pathlib import Path
sys.dont_write_bytecode = True
try:
    import timm
except ModuleNotFoundError as error:
    print(error, "timm" in sys.modules)
Path({str(init)!r}).write_text({good + "# another length"!r})
import timm
print(timm.registered)
{OURS}
"""
    assert python(code, packages) == ["No module named 'no_such_module' False", "['bcos']", "[]"]


def test_what_goes_wrong_in_registering_is_a_warning(packages: Path) -> None:
    (packages / "bcos_train" / "zoo" / "timm_models.py").write_text("from timm import no_such_name\n")
    code = """
import warnings, bcos_train.zoo
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import timm
print(timm.registered, *[str(warning.message).partition("(")[0] for warning in caught])
"""
    assert python(code, packages) == ["[] the B-cos models are not registered in timm: ImportError"]


def test_other_hooks_are_heard(packages: Path) -> None:
    """A finder of someone else's, such as that of an editable installation, may be the one that finds timm."""
    (packages / "timm").rename(packages / "elsewhere")
    code = f"""
import sys, bcos_train.zoo
from importlib.util import spec_from_file_location
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "timm":
            folder = {str(packages / "elsewhere")!r}
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.append(Finder)
sys.path = [path for path in sys.path if "site-packages" not in path]
import timm
print(timm.registered)
"""
    assert python(code, packages) == ["['bcos']"]


def test_code_of_the_hook_is_small() -> None:
    lines = [line.strip() for line in Path(timm_hook.__file__).read_text(encoding="utf-8").splitlines()]
    body = lines[lines.index('__all__ = ["register_in_timm"]') + 1 :]
    assert len([line for line in body if line and not line.startswith(("#", '"""'))]) < 40
