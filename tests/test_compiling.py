"""Where what is compiled is kept."""

from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from bcos_train.compiling import prepare_to_compile


@pytest.mark.parametrize("given", [None, "default", "elsewhere"])
def test_cache_outlives_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """Unless the user has chosen a folder; torch's default, which its import may have set, is none that was chosen."""
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what was there comes back
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    else:
        monkeypatch.setenv(
            "TORCHINDUCTOR_CACHE_DIR", default_cache_dir() if given == "default" else str(tmp_path / given)
        )
    prepare_to_compile("this")
    expected = tmp_path / ("elsewhere" if given == "elsewhere" else "bcos-train/inductor")
    assert cache_dir() == str(expected)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c++-of-my-own")
    with pytest.raises(
        ValueError, match=r"this needs a C\+\+ compiler, and there is no c\+\+-of-my-own; the variable CXX"
    ):
        prepare_to_compile("this")
