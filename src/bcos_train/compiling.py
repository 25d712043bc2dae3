"""What `torch.compile` needs of the machine."""

import os
import shutil
import sys
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

__all__ = ["compiler_name", "prepare_to_compile"]


def compiler_name() -> str:
    """The C++ compiler that torch takes, and no other."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def prepare_to_compile(what: str) -> None:
    """See that there is a compiler, and that what it makes outlives this machine's temporary files.

    It is kept in ``~/.cache/bcos-train`` (``$XDG_CACHE_HOME``), unless ``TORCHINDUCTOR_CACHE_DIR`` names a folder.

    Args:
        what: The option that asks for it, for the message.

    Raises:
        ValueError: There is none.
    """
    if not shutil.which(compiler_name()):
        raise ValueError(
            f"{what} needs a C++ compiler, and there is no {compiler_name()}; the variable CXX can name another"
        )
    # Parts of torch, when imported, set the variable to their default, a temporary folder.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "bcos-train" / "inductor")
