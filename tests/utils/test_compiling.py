import importlib.util
import sysconfig
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from bcos_train.utils.compiling import missing_for_compiling, prepare_to_compile


@pytest.mark.parametrize("given", [None, "default", "elsewhere"])
def test_cache_is_persistent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """Unless the user has set a folder; torch's default, which importing it may have set, doesn't count."""
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch restores it
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    else:
        monkeypatch.setenv(
            "TORCHINDUCTOR_CACHE_DIR", default_cache_dir() if given == "default" else str(tmp_path / given)
        )
    prepare_to_compile("this")
    expected = tmp_path / ("elsewhere" if given == "elsewhere" else "bcos-train/inductor")
    assert cache_dir() == str(expected)


def test_home_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(compiler))  # a file
    prepare_to_compile("this")
    assert cache_dir() == default_cache_dir()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c++-of-my-own")
    with pytest.raises(ValueError, match=r"this needs a C\+\+ compiler, but there is no c\+\+-of-my-own; set CXX"):
        prepare_to_compile("this")


@pytest.mark.parametrize(
    ("triton", "headers", "expected"),
    [(True, True, None), (False, True, "needs Triton on CUDA"), (True, False, "needs Python's header files on CUDA")],
)
def test_cuda_needs_more(
    triton: bool, headers: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    # The headers may be in either folder.
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path / "empty")})
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    if headers:
        (tmp_path / "Python.h").touch()
    missing = missing_for_compiling(cuda=True)
    assert missing is None if expected is None else missing is not None and missing.startswith(expected)
    assert missing_for_compiling() is None
