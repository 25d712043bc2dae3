"""Completeness by hand."""

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


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[\(2,\), \(2, 1\)\]"):
        completeness_error(torch.ones(2), torch.ones(2, 1), 0.0)
