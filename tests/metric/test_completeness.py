"""Completeness by hand."""

import math

import pytest
import torch

from bcos_train.metric import completeness_error


def test_values():
    logit = torch.tensor([4.0, -4.0, 2.0, 0.0, 0.0])
    contributions = torch.tensor([5.0, -2.0, 3.0, 1.0, 4.0])
    error = completeness_error(logit, contributions, -1.0)
    # The last two have a logit of zero: the residual itself.
    assert error.tolist() == [0.0, 0.25, 0.0, 0.0, 3.0]


def test_constant_of_each_sample():
    error = completeness_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5]))
    assert error.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (2, 3)], ids=str)
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with torch.inference_mode():
        error = completeness_error(torch.full(shape, -2.0, dtype=dtype), torch.full(shape, 3.0, dtype=dtype), -4.0)
    assert error.dtype == dtype
    assert torch.equal(error, torch.full(shape, 0.5, dtype=dtype))


@pytest.mark.parametrize("arguments", [(math.nan, 1.0, 0.0), (1.0, math.nan, 0.0), (1.0, 1.0, math.nan)], ids=str)
def test_nan_is_not_hidden(arguments: tuple[float, ...]) -> None:
    assert completeness_error(*(torch.tensor([value, 1.0]) for value in arguments)).isnan().tolist() == [True, False]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[\(2,\), \(2, 1\)\]"):
        completeness_error(torch.ones(2), torch.ones(2, 1), 0.0)
