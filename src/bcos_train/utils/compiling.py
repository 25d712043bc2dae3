"""Check and set up what ``torch.compile`` requires of the machine."""

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

__all__ = ["compiler_name", "missing_for_compiling", "prepare_to_compile"]


def compiler_name() -> str:
    """Return the C++ compiler that torch uses."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def missing_for_compiling(cuda: bool = False) -> str | None:
    """Return what ``torch.compile`` lacks on this machine, as a clause for a message, or None if it lacks nothing.

    Args:
        cuda: Compile for a CUDA device.
    """
    if not shutil.which(compiler_name()):
        return f"needs a C++ compiler, but there is no {compiler_name()}; set CXX to another one"
    if cuda and importlib.util.find_spec("triton") is None:
        return "needs Triton on CUDA, which is not installed: pip install triton"
    # Triton compiles extension modules. On Debian, the first folder is for packages that the user installs.
    folders = sysconfig.get_paths()["include"], sysconfig.get_config_var("INCLUDEPY") or ""
    if cuda and not any(Path(folder, "Python.h").exists() for folder in folders):
        return "needs Python's header files on CUDA, which are not installed: install python3-dev"
    return None


def prepare_to_compile(option: str, cuda: bool = False) -> None:
    """Check that there is a compiler, and set a persistent cache folder for compiled code.

    The folder is ``~/.cache/bcos-train`` (``$XDG_CACHE_HOME``), unless ``TORCHINDUCTOR_CACHE_DIR`` names another
    or it can't be written.

    Args:
        option: The option that requires a compiler, for the message.
        cuda: Compile for a CUDA device.

    Raises:
        ValueError: Something is missing.
    """
    if missing := missing_for_compiling(cuda):
        raise ValueError(f"{option} {missing}")
    # Importing parts of torch sets the variable to its default, a temporary folder.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        # Without a usable home, compiled code goes to torch's temporary folder.
        with contextlib.suppress(OSError, RuntimeError):
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bcos-train" / "inductor"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
