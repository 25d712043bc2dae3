"""Models are registered in timm by ``import bcos_train.timm`` and by nothing else."""

import subprocess
import sys

import pytest

COUNT = "print(len(timm.list_models('bcos_*')) > 50, timm.is_model('standard_vitc_ti_patch1_14'))"


def python(code: str) -> list[str]:
    """Lines printed by the code in a process of its own."""
    command = [sys.executable, "-W", "error:::bcos_train", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "imports", ["import bcos_train.timm, timm", "import timm, bcos_train.timm", "from bcos_train import timm as _"]
)
def test_registered_in_either_order(imports: str) -> None:
    assert python(f"{imports}; import timm; {COUNT}; print(timm.create_model('bcos_resnet20').num_classes)") == [
        "True True",
        "10",
    ]


def test_bcos_train_alone_imports_and_registers_nothing() -> None:
    code = (
        "import sys; before = list(sys.meta_path); import bcos_train; "
        f"print('timm' in sys.modules, sys.meta_path == before); import timm; {COUNT}"
    )
    assert python(code) == ["False True", "False False"]
