"""Values out of range."""

from typing import Any

import pytest

from bcos_train.guidance import LOCALIZATION_LOSSES, GuidanceOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -0.1}, "weight=-0.1: at least 0"),
        ({"weight": float("nan")}, "weight=nan: at least 0"),
        ({"start_epoch": -1}, "start_epoch=-1: at least 0"),
        ({"box_dilation": -0.5}, "box_dilation=-0.5: at least 0"),
        ({"annotated_seed": -1}, "annotated_seed=-1: at least 0"),
        ({"annotated_fraction": 0.0}, "annotated_fraction=0.0: more than 0, up to 1"),
        ({"annotated_fraction": 1.5}, "annotated_fraction=1.5: more than 0, up to 1"),
        ({"method": "lime"}, "method=lime: one of bcos, ixg, grad_cam"),
        ({"loss": "l2"}, "loss=l2: one of energy, l1, ppce, rrr"),
    ],
)
def test_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceOptions(**{"loss": "energy", **changes})


def test_every_loss_has_a_choice() -> None:
    for loss in LOCALIZATION_LOSSES:
        assert GuidanceOptions(loss=loss).loss == loss  # type: ignore[arg-type]
