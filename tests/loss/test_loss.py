from collections.abc import Callable
from typing import Any

import pytest
import torch
from bcos.modules.losses import BinaryCrossEntropyLoss, UniformOffLabelsBCEWithLogitsLoss
from torch import Tensor, nn

from bcos_train.loss import BinaryCrossEntropy, CrossEntropy, UniformOffLabelBinaryCrossEntropy

N, K = 5, 7
LOGITS = 4 * torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
INDICES = torch.tensor([0, 6, 3, 3, 1])
MIXED = 0.3 * nn.functional.one_hot(INDICES, K).double() + 0.7 * nn.functional.one_hot(INDICES.roll(1), K).double()
TARGETS = {"indices": INDICES, "mixed": MIXED}

#: Ours and the official one with the same options.
PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    "bce": (BinaryCrossEntropy(), BinaryCrossEntropyLoss()),
    "bce smoothing": (BinaryCrossEntropy(smoothing=0.1), BinaryCrossEntropyLoss(smoothing=0.1)),
    "bce threshold": (BinaryCrossEntropy(target_threshold=0.5), BinaryCrossEntropyLoss(target_threshold=0.5)),
    "bce threshold 0": (BinaryCrossEntropy(target_threshold=0.0), BinaryCrossEntropyLoss(target_threshold=0.0)),
    "bce both": (
        BinaryCrossEntropy(smoothing=0.2, target_threshold=0.25),
        BinaryCrossEntropyLoss(smoothing=0.2, target_threshold=0.25),
    ),
    "uniform": (UniformOffLabelBinaryCrossEntropy(), UniformOffLabelsBCEWithLogitsLoss()),
    "uniform off_label": (
        UniformOffLabelBinaryCrossEntropy(off_label=2e-3),
        UniformOffLabelsBCEWithLogitsLoss(off_label=2e-3),
    ),
    "cross entropy": (CrossEntropy(), nn.CrossEntropyLoss()),
    "cross entropy smoothing": (CrossEntropy(smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
}


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("ours", "official"), PAIRS.values(), ids=PAIRS)
def test_equals_the_official_loss(ours: nn.Module, official: nn.Module, target: Tensor, dtype: torch.dtype) -> None:
    target = target.to(dtype) if target.is_floating_point() else target
    results = [value_and_gradient(loss, LOGITS.to(dtype), target) for loss in (ours, official)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].dtype == dtype


def bce_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


#: What becomes of the one-hot or mixed targets, written out.
BY_HAND: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "bce": (BinaryCrossEntropy(), lambda t: t),
    "smoothing": (BinaryCrossEntropy(smoothing=0.1), lambda t: 0.9 * t + 0.1 / K),
    "threshold": (BinaryCrossEntropy(target_threshold=0.5), lambda t: (t > 0.5).double()),
    "uniform": (UniformOffLabelBinaryCrossEntropy(), lambda t: torch.where(t < 1 / K, 1 / K, t)),
    "off_label": (UniformOffLabelBinaryCrossEntropy(off_label=0.4), lambda t: torch.where(t < 0.4, 0.4, t)),
    "off_label 0": (UniformOffLabelBinaryCrossEntropy(off_label=0.0), lambda t: t),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("loss", "change"), BY_HAND.values(), ids=BY_HAND)
def test_equals_the_formula(loss: nn.Module, change: Callable[[Tensor], Tensor], target: Tensor) -> None:
    dense = target if target.is_floating_point() else nn.functional.one_hot(target, K).double()
    torch.testing.assert_close(loss(LOGITS, target), bce_by_hand(LOGITS, change(dense)), rtol=1e-12, atol=0)


def test_off_label_of_zero_is_not_taken_for_the_default() -> None:
    """The official code replaces 0.0 by 1/K, through ``off_label or 1/K``."""
    official = UniformOffLabelsBCEWithLogitsLoss(off_label=0.0)(LOGITS, INDICES)
    ours = UniformOffLabelBinaryCrossEntropy(off_label=0.0)(LOGITS, INDICES)
    assert ours == BinaryCrossEntropy()(LOGITS, INDICES)
    assert ours != official


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("ours", [ours for ours, _ in PAIRS.values()], ids=PAIRS)
def test_half_precision_logits_are_computed_in_float32(ours: nn.Module, target: Tensor, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    target = target.float() if target.is_floating_point() else target
    value, gradient = value_and_gradient(ours, logits, target)
    expected, expected_gradient = value_and_gradient(ours, logits.float(), target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_label_distribution_in_half_precision() -> None:
    value = UniformOffLabelBinaryCrossEntropy()(LOGITS.bfloat16(), MIXED.bfloat16())
    expected = UniformOffLabelBinaryCrossEntropy()(LOGITS.bfloat16().float(), MIXED.bfloat16().float())
    assert torch.equal(value, expected)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for loss, _ in PAIRS.values():
        value, gradient = value_and_gradient(loss, logits, torch.tensor([1]))
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_as_many_classes_as_images() -> None:
    """Class indices (N,) are not taken for a distribution (N, K) if N equals K."""
    logits, indices = LOGITS[:5, :5], torch.tensor([0, 1, 2, 3, 4])
    dense = torch.eye(5, dtype=torch.float64)
    for loss, _ in PAIRS.values():
        torch.testing.assert_close(loss(logits, indices), loss(logits, dense), rtol=1e-12, atol=0)


def test_probabilities() -> None:
    assert torch.equal(BinaryCrossEntropy.probabilities(LOGITS), LOGITS.sigmoid())
    assert torch.equal(UniformOffLabelBinaryCrossEntropy().probabilities(LOGITS), LOGITS.sigmoid())
    assert torch.equal(CrossEntropy().probabilities(LOGITS), LOGITS.softmax(-1))


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), UniformOffLabelBinaryCrossEntropy()], ids=repr)
def test_wrong_number_of_targets(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match="5 rows of logits but 4 targets"):
        loss(LOGITS, INDICES[:4])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (BinaryCrossEntropy, {"smoothing": 1.0}, "smoothing=1.0: at least 0 and less than 1"),
        (BinaryCrossEntropy, {"smoothing": -0.1}, "smoothing=-0.1"),
        (BinaryCrossEntropy, {"target_threshold": 1.0}, "target_threshold=1.0: at least 0 and less than 1"),
        (BinaryCrossEntropy, {"target_threshold": -1.0}, "target_threshold=-1.0"),
        (UniformOffLabelBinaryCrossEntropy, {"off_label": 1.5}, "off_label=1.5: from 0 to 1"),
        (UniformOffLabelBinaryCrossEntropy, {"off_label": -0.5}, "off_label=-0.5"),
        (CrossEntropy, {"smoothing": 1.0}, "smoothing=1.0: at least 0 and less than 1"),
    ],
)
def test_options_out_of_range(make: Callable[..., Any], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_repr_shows_the_options() -> None:
    assert repr(BinaryCrossEntropy(0.1)) == "BinaryCrossEntropy(smoothing=0.1, target_threshold=None)"
    assert repr(UniformOffLabelBinaryCrossEntropy(0.0)) == "UniformOffLabelBinaryCrossEntropy(off_label=0.0)"
    assert repr(CrossEntropy(0.2)) == "CrossEntropy(smoothing=0.2)"


def test_multi_hot_targets() -> None:
    logits, target = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
    p = torch.sigmoid(logits)[0]
    expected = -(p[0].log() + (1 - p[1]).log() + p[2].log()) / 3
    torch.testing.assert_close(BinaryCrossEntropy()(logits, target), expected)
    off_label = -(p[0].log() + p[1].log() * 0.3 + (1 - p[1]).log() * 0.7 + p[2].log()) / 3
    torch.testing.assert_close(UniformOffLabelBinaryCrossEntropy(0.3)(logits, target), off_label)
