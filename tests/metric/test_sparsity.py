"""The Gini index by hand, and by its definition as the mean difference of all pairs."""

import math

import pytest
import torch
from torch import Tensor

from bcos_train.metric import gini_index


def slow_gini(attribution: Tensor) -> float:
    """Half the relative mean absolute difference of all pairs of magnitudes."""
    values = [abs(v) for v in attribution.flatten().tolist()]
    n = len(values)
    differences = sum(abs(a - b) for a in values for b in values)
    return differences / (2 * n * sum(values)) if sum(values) else 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_equals_the_mean_difference(dtype: torch.dtype, tolerance: float) -> None:
    maps = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    maps[0, 0] = 0
    expected = [[slow_gini(maps[n, t]) for t in range(3)] for n in range(2)]
    index = gini_index(maps)
    assert index.dtype == dtype
    assert torch.allclose(index, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0)
    assert torch.allclose(gini_index(maps[1, 2]), index[1, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], 0.0),
        ([[1.0, -1.0], [-1.0, 1.0]], 0.0),
        ([[0.0, 0.0], [-3.0, 0.0]], 0.75),
        ([[1.0, 3.0]], 0.25),  # (−1·1 + 1·3) / (2·4)
        ([[-4.0, -1.0, -2.0, -3.0]], 0.25),  # (−3·1 − 1·2 + 1·3 + 3·4) / (4·10)
        ([[5.0]], 0.0),
        ([[0.0, 0.0]], 0.0),
        ([[math.nan, 1.0]], 0.0),
        ([[math.inf, 1.0]], 0.0),
    ],
    ids=["equal", "signs", "one-pixel", "two", "all-negative", "single", "zero", "nan", "infinite"],
)
def test_by_hand(values: list[list[float]], expected: float) -> None:
    assert gini_index(torch.tensor(values)).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-40, 1e-6, 1e37, -2.0])
def test_scale_invariance(scale: float) -> None:
    maps = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert gini_index(scale * maps).item() == pytest.approx(0.25, rel=1e-4)


def test_one_axis_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"must be \(\*, H, W\), got \(4,\)"):
        gini_index(torch.ones(4))
