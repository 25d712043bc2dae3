from typing import Any

import pytest
import torch

from bcos_train.optimizer import timm_optimizer


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("adamw", "AdamW", {"betas": [0.8, 0.9]}),
        ("lamb", "Lamb", None),
        ("lion", "Lion", {"betas": [0.9, 0.95]}),
        ("sgd", "SGD", {}),
        ("rmsproptf", "RMSpropTF", None),
        ("adan", "Adan", None),
    ],
)
def test_a_step(name: str, class_name: str, options: dict[str, Any] | None) -> None:
    weights = [torch.ones(4, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    optimizer = timm_optimizer(iter(weights), name=name, lr=0.1, weight_decay=0.01, options=options)
    assert type(optimizer).__name__ == class_name
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * len(optimizer.param_groups)
    # All parameters alike, also the one-dimensional ones, which timm would leave without decay for a whole model.
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    for key, value in (options or {}).items():
        assert list(optimizer.param_groups[0][key]) == value
    sum((weight**2).sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all((weight < 1).all() for weight in weights)


def test_momentum() -> None:
    optimizer = timm_optimizer([torch.ones(3, requires_grad=True)], name="momentum", lr=0.1, momentum=0.75)
    assert optimizer.param_groups[0]["momentum"] == 0.75


def test_options_are_not_changed() -> None:
    options = {"betas": [0.8, 0.9]}
    timm_optimizer([torch.ones(3, requires_grad=True)], name="adamw", lr=0.1, options=options)
    assert options == {"betas": [0.8, 0.9]}


@pytest.mark.parametrize(("name", "nearest"), [("lamp", "lamb"), ("adam-w", "adamw")])
def test_unknown_name(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.name={name}: timm has no such optimizer; did you mean {nearest}"):
        timm_optimizer([torch.ones(3, requires_grad=True)], name=name, lr=0.1)


@pytest.mark.parametrize("options", [{"bettas": [0.9, 0.99]}, {"lr": 0.2}, {"opt": "sgd"}])
def test_unknown_option(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optimizer.options=\{.*\}: not supported by timm's adamw \("):
        timm_optimizer([torch.ones(3, requires_grad=True)], name="adamw", lr=0.1, options=options)
