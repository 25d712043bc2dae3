import pytest
import torch
from bcos.modules import LogitLayer as OfficialLogitLayer

from bcos_train.nn import LogitLayer


@pytest.mark.parametrize("temperature", [None, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("bias", [None, 0.0, -4.6])
def test_equals_official(temperature, bias):
    x = torch.randn(3, 4)
    assert torch.equal(LogitLayer(temperature, bias)(x), OfficialLogitLayer(temperature, bias)(x))


def test_zero_bias_is_a_value():
    layer = LogitLayer(logit_bias=0.0)
    assert layer.logit_bias == 0.0
    assert "logit_bias=0.0" in repr(layer)


def test_nothing_given_changes_nothing():
    x = torch.randn(3, 4)
    assert LogitLayer()(x) is x
    assert repr(LogitLayer()) == "LogitLayer()"


def test_has_no_state():
    assert not LogitLayer(2.0, 1.0).state_dict()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"logit_temperature": 0},
        {"logit_temperature": -1.0},
        {"logit_temperature": float("nan")},
        {"logit_bias": float("inf")},
    ],
    ids=str,
)
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        LogitLayer(**kwargs)


def test_typo_is_an_error():
    with pytest.raises(TypeError, match="logit_temprature"):
        LogitLayer(logit_temprature=2.0)
