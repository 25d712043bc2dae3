"""What `torch.compile` needs of the machine."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

__all__ = ["compiler_name", "missing_for_compiling", "prepare_to_compile"]


def compiler_name() -> str:
    """The C++ compiler that torch takes, and no other."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def missing_for_compiling(cuda: bool = False) -> str | None:
    """What `torch.compile` lacks on this machine, as a clause for a message; None if there is everything.

    Args:
        cuda: compile for a CUDA device.
    """
    if not shutil.which(compiler_name()):
        return f"needs a C++ compiler, and there is no {compiler_name()}; the variable CXX can name another"
    if cuda and importlib.util.find_spec("triton") is None:
        return "needs Triton on CUDA, which is not installed: pip install triton"
    # Triton compiles extension modules. On Debian the first of the folders is one for what the user installs.
    folders = sysconfig.get_paths()["include"], sysconfig.get_config_var("INCLUDEPY") or ""
    if cuda and not any(Path(folder, "Python.h").exists() for folder in folders):
        return "needs Python's header files on CUDA, which are not installed: the package python3-dev has them"
    return None


def prepare_to_compile(what: str, cuda: bool = False) -> None:
    """See that there is a compiler, and that what it makes outlives this machine's temporary files.

    It is kept in ``~/.cache/bcos-train`` (``$XDG_CACHE_HOME``), unless ``TORCHINDUCTOR_CACHE_DIR`` names a folder.

    Args:
        what: The option that asks for it, for the message.
        cuda: Compile for a CUDA device.

    Raises:
        ValueError: Something is missing.
    """
    if missing := missing_for_compiling(cuda):
        raise ValueError(f"{what} {missing}")
    # Parts of torch, when imported, set the variable to their default, a temporary folder.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "bcos-train" / "inductor")
