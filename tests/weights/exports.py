"""Helpers for the tests of exporting."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcos_train.weights.files import read_weights

State = dict[str, Tensor]


def state_in(folder: Path, is_ema: bool) -> State:
    return read_weights(folder, is_ema)[0]


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def training_checkpoint(state: State, averaged: State | None = None, **more: Any) -> dict[str, Any]:
    """What the official training code saves, by its LightningModule's attributes."""
    content = {f"model.{key}": value for key, value in state.items()}
    if averaged is not None:
        content["ema.n_averaged"] = torch.tensor(3)
        content |= {f"ema.module.{key}": value for key, value in averaged.items()}
    names = {"dataset": "ImageNet", "base_network": "bcos_final", "experiment_name": "resnet_18"}
    return {
        "epoch": 89,
        "global_step": 12,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": content,
        "callbacks": {"MetricsTracker": {"eval_acc1": [(0, 0.1)]}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": names | {"model": {"args": {"norm_layer": "NoBias(BatchNormUncentered2d)"}}},
        **more,
    }
