"""The order of MaxOut's candidates in memory."""

import pytest
import torch
from torch import Tensor

from bcos_train.nn.fast import gpu_device
from bcos_train.nn.fast.maxout import from_blocked, to_blocked

LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def by_hand(weight: Tensor, groups: int, candidates: int) -> Tensor:
    """The blocked rows, one by one."""
    units = len(weight) // (groups * candidates)
    rows = [
        weight[(group * units + unit) * candidates + candidate]
        for group in range(groups)
        for candidate in range(candidates)
        for unit in range(units)
    ]
    return torch.stack(rows)


@LAYOUTS
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("groups", "candidates"), [(1, 1), (1, 2), (3, 2), (2, 3), (12, 2)])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "as on a GPU"])
def test_blocks(
    on_gpu: bool,
    groups: int,
    candidates: int,
    kernel_size: int,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if on_gpu:
        monkeypatch.setattr(gpu_device, "GPU_TYPES", {"cpu"})
    weight = torch.randn(24, 5, kernel_size, kernel_size).to(memory_format=layout)
    blocked = to_blocked(weight, candidates, groups)
    assert torch.equal(blocked, by_hand(weight, groups, candidates))
    restored = from_blocked(blocked, candidates, groups)
    assert torch.equal(restored, weight)
    if on_gpu:
        assert blocked.stride() == restored.stride() == weight.stride()


def test_matrix_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_device, "GPU_TYPES", {"cpu"})
    weight = torch.randn(6, 5)
    blocked = to_blocked(weight, 2, 1)
    assert torch.equal(blocked, torch.cat([weight[::2], weight[1::2]]))
    assert torch.equal(from_blocked(blocked, 2, 1), weight)
