"""TF32 is disabled while explanations are computed, and restored afterwards."""

import multiprocessing
import warnings
from typing import Any

import pytest
import torch

from bcos_train.explanation import allow_tf32, without_tf32

BACKENDS = torch.backends

#: How a user may have set TF32. Each in a process of its own, since some can't be undone.
SETTINGS = [
    "pass",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
]


def flags() -> dict[str, Any]:
    """All that PyTorch says about it, in both interfaces; None where it refuses to answer."""
    questions = {
        "matmul": lambda: BACKENDS.cuda.matmul.fp32_precision,
        "conv": lambda: BACKENDS.cudnn.conv.fp32_precision,
        "rnn": lambda: BACKENDS.cudnn.rnn.fp32_precision,
        "cpu matmul": lambda: BACKENDS.mkldnn.matmul.fp32_precision,
        "old matmul": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "old cudnn": lambda: BACKENDS.cudnn.allow_tf32,
        "old precision": torch.get_float32_matmul_precision,
    }
    found = {}
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except RuntimeError:
            found[name] = None
    return found


def is_off() -> bool:
    found = flags()
    # The older interface answers too: Lightning and torch.compile ask it.
    return (found["matmul"], found["conv"], found["old matmul"], found["old cudnn"]) == ("ieee", "ieee", False, False)


@without_tf32()
def fail_without_tf32() -> None:
    assert is_off()
    raise KeyError


def check() -> None:
    """Nested, left by an exception, and without a warning."""
    before = flags()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_tf32():
            assert is_off()
            with pytest.raises(KeyError):
                fail_without_tf32()
            assert is_off()
    after = flags()
    # An interface that gave no answer before may give one now.
    assert {key: after[key] for key in before if before[key] is not None} == {
        key: value for key, value in before.items() if value is not None
    }


def check_after(setting: str) -> None:
    exec(setting)
    check()


@pytest.mark.parametrize("setting", SETTINGS)
def test_off_inside_and_restored_afterwards(setting: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=check_after, args=(setting,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_allow_tf32() -> None:
    before = flags()
    with without_tf32():  # which restores what was
        for allowed in (True, False):
            allow_tf32(allowed)
            assert BACKENDS.cuda.matmul.allow_tf32 == BACKENDS.cudnn.allow_tf32 == allowed
            assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") == allowed
    assert flags() == before
