"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for an H100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from bcos_train.nn.fast import triton_kernels as kernels

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.skipif(
    VERSION < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason=f"the interpreter of Triton {triton.__version__} fails under numpy {np.__version__}",
)
def test_interpreted() -> None:
    path = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Compiled for an H100.

POINTERS = {  # of each kernel: types of its parameters, P the dtype of activations, F float32
    "_sum_of_squares_kernel": "P F i32 i32 fp32 fp32",
    "_window_norm_kernel": "F F i32 i32 i32 i32 i32 i32 i32 i32 i32 fp32",
    "_square_kernel": "P F i32 i32",
    "_square_backward_kernel": "P P F P F i32 i32",
    "_add_product_kernel": "P P F i32 i32",
    "_batch_norm_constants_kernel": "F F F I i32 i32 fp32",
    "_normalize_kernel": "F P F i32",
    "_normalize_backward_kernel": "P F F F i32",
}
CONSTANTS = {"KIND": 1, "KEPT_OUT": False, "KH": 3, "KW": 3, "BLOCK": 512, "BK": 1024}


def ptxas() -> Path | None:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The newer one where there are two.
    return next((path for name in ("ptxas-blackwell", "ptxas") if (path := folder / name).exists()), None)


def compiled(name: str, dtype: str, rows: bool) -> str:
    """What ptxas reports of a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    kinds = {"P": f"*{dtype}", "F": "*fp32", "I": "*i32"}
    types = [kinds.get(kind, kind) for kind in POINTERS[name].split()]
    signature = dict(zip(kernel.arg_names, types, strict=False))
    bp, bc = kernels.tiles([1 if rows else 256, 3136, 256], rows)
    values = {**CONSTANTS, "ROWS": rows, "BP": bp, "BC": 512 if "constants" in name else bc}
    constants = {key: values[key] for key in kernel.arg_names[len(types) :]}
    signature |= dict.fromkeys(constants, "constexpr")
    # As at a launch: pointers, and sizes such as 64, are multiples of 16.
    divisible = [i for i, kind in enumerate(types) if kind.startswith("*") or kernel.arg_names[i] in "PCK"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    code = result.asm["ptx"]
    architecture = re.search(r"\.target (sm_\w+)", code)
    assert architecture is not None
    command = [str(ptxas()), "-v", f"--gpu-name={architecture.group(1)}", "/dev/stdin", "-o", "/dev/null"]
    return subprocess.run(command, input=code, capture_output=True, text=True, check=True).stderr


VARIANTS = [
    (name, dtype, rows)
    for name, types in POINTERS.items()
    for dtype in (("fp32", "bf16", "fp16") if "P" in types else ("fp32",))
    for rows in ((True, False) if "ROWS" in getattr(kernels, name).arg_names else (True,))
]


@pytest.mark.skipif(ptxas() is None, reason="this build of Triton has no compiler for NVIDIA's GPUs")
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="kernels are interpreted")
@pytest.mark.parametrize(("name", "dtype", "rows"), VARIANTS)
def test_compiled_without_spills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dtype: str, rows: bool
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    report = compiled(name, dtype, rows)
    spills = re.search(r"(\d+) bytes spill stores", report)
    assert spills is not None, report
    assert spills.group(1) == "0"


def test_layers_do_without_triton() -> None:
    """Where it is not installed; and where it is, nobody imports the kernels before they are called."""
    code = """
import sys
sys.modules["triton"] = None
import torch, bcos_train.nn
layer = bcos_train.nn.BcosConv2d(3, 4, 3)
layer(torch.rand(1, 3, 5, 5)).sum().backward()
assert "bcos_train.nn.fast.triton_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
