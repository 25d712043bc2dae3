"""Perturbation curves against one image and one block at a time, and by hand on a linear model."""

import math

import pytest
import torch
from torch import Tensor, nn

from bcos_train.metric import FRACTIONS, area_under_curve, perturbation_curve
from bcos_train.nn import BcosConv2d, LogitLayer


class BcosNet(nn.Module):
    """Model with dropout, which evaluation mode must disable."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(BcosConv2d(6, 8, 3), nn.Dropout(0.5), BcosConv2d(8, 5, 3))
        self.logit = LogitLayer(logit_temperature=0.1, logit_bias=-1.0)
        self.batch_sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batch_sizes.append(len(x))
        return self.logit(self.layers(x).mean((2, 3)))

    to_probabilities = staticmethod(torch.sigmoid)


class Sum(nn.Module):
    """Model with two logits: the sum of the pixels, and 0."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum((1, 2, 3))
        return torch.stack([total, torch.zeros_like(total)], 1)


def slow_curve(
    model: nn.Module,
    image: Tensor,
    attribution: Tensor,
    target: int,
    order: str,
    insert: bool,
    baseline: Tensor,
    block: int,
    fractions: tuple[float, ...],
) -> list[float]:
    """Probabilities of a B-cos model for one image (3, H, W)."""
    height, width = attribution.shape
    corners = [(y, x) for y in range(0, height, block) for x in range(0, width, block)]
    sums = [attribution[y : y + block, x : x + block].sum().item() for y, x in corners]
    sign = -1 if order == "most" else 1
    ranked = sorted(range(len(corners)), key=lambda i: (sign * sums[i], i))
    values = []
    for fraction in fractions:
        current, other = (baseline, image) if insert else (image, baseline)
        current = current.clone()
        for i in ranked[: round(fraction * len(corners))]:
            y, x = corners[i]
            current[:, y : y + block, x : x + block] = other[:, y : y + block, x : x + block]
        with torch.no_grad():
            logits = model(torch.cat([current, 1 - current])[None])
        values.append(torch.sigmoid(logits)[0, target].item())
    return values


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    image = torch.rand(3, 3, 13, 18, generator=generator, dtype=torch.float64)
    x = torch.cat([image, 1 - image], 1)
    attributions = torch.randn(3, 13, 18, generator=generator, dtype=torch.float64)
    return BcosNet().double().eval(), x, attributions, torch.tensor([4, 0, 2])


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("insert", [False, True], ids=["delete", "insert"])
@pytest.mark.parametrize("block", [1, 4, 9, 64])
def test_equals_one_block_at_a_time(case, order: str, insert: bool, block: int) -> None:
    model, x, attributions, target = case
    fractions = (0.0, 0.25, 0.6, 1.0)
    baseline = torch.rand(3, 3, 13, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"order": order, "insert": insert, "block": block, "fractions": fractions}
    curves = perturbation_curve(model, x, attributions, target, baseline=baseline, **options)
    expected = [
        slow_curve(model, x[n, :3], attributions[n], int(target[n]), baseline=baseline[n], **options) for n in range(3)
    ]
    assert torch.allclose(curves, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    in_float32 = perturbation_curve(
        model.float(), x.float(), attributions.float(), target, baseline=baseline.float(), **options
    )
    assert in_float32.dtype == torch.float32
    assert torch.allclose(in_float32.double(), curves, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_results_do_not_depend_on_the_batch_size(case, batch_size: int) -> None:
    model, x, attributions, target = case
    expected = perturbation_curve(model, x, attributions, target, block=5)
    model.batch_sizes.clear()
    curves = perturbation_curve(model, x, attributions, target, block=5, batch_size=batch_size)
    assert torch.allclose(curves, expected, atol=1e-12)
    assert max(model.batch_sizes) == min(batch_size, 27)
    assert sum(model.batch_sizes) == 27
    alone = perturbation_curve(model, x[1:2], attributions[1:2], target[1:2], block=5)
    assert torch.allclose(alone[0], curves[1], atol=1e-12)


def test_the_same_number_of_blocks_is_computed_once(case) -> None:
    model, x, attributions, target = case
    curves = perturbation_curve(model, x, attributions, target, block=16)  # 1 x 2 blocks
    assert sum(model.batch_sizes) == 3 * len({round(2 * f) for f in FRACTIONS}) == 9
    assert curves.shape == (3, 9)


def test_by_hand() -> None:
    # Blocks of 2 pixels: sums 3, 7, 11, and 7 alone in the last, smaller one.
    x = torch.arange(1.0, 8.0).view(1, 1, 1, 7)
    attribution = torch.tensor([[[0.0, 1.0, -5.0, 0.0, 4.0, 5.0, 2.0]]])  # 1, -5, 9, 2
    options = {"block": 2, "fractions": (0, 0.25, 0.5, 0.75, 1), "output": "logit"}

    def curve(**more: object) -> list[float]:
        return perturbation_curve(Sum(), x, attribution, torch.tensor([0]), **options, **more)[0].tolist()

    assert curve() == [0, -11, -18, -21, -28]
    assert curve(order="least") == [0, -7, -10, -17, -28]
    assert curve(insert=True) == [-28, -17, -10, -7, 0]
    assert curve(baseline=1.0) == [0, -9, -15, -16, -21]
    probability = perturbation_curve(Sum(), x, attribution, torch.tensor([1]), block=7, fractions=[1])
    assert probability.tolist() == [[0.5]]  # softmax of (0, 0)


def test_only_the_image_is_perturbed_and_encoded_again() -> None:
    seen = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3))

    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    perturbation_curve(
        Recorder(), torch.cat([image, 1 - image], 1), image[:, 0], torch.tensor([0, 1]), block=2, baseline=0.25
    )
    inputs = torch.cat(seen)
    assert torch.equal(inputs[:, 3:], 1 - inputs[:, :3])
    assert (inputs[:, :3] == 0.25).any()


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf], ids=str)
def test_ties_go_in_reading_order(order: str, value: float) -> None:
    x = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
    curves = perturbation_curve(
        Sum(), x, torch.full((1, 2, 3), value), torch.tensor([0]), order=order, block=1, output="logit",
        fractions=[k / 6 for k in range(7)],
    )  # fmt: skip
    assert curves.tolist() == [[0, -1, -3, -7, -15, -31, -63]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_non_finite_values_count_as_0(value: float) -> None:
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    attribution = torch.tensor([[[-1.0, value, 1.0]]])
    curves = perturbation_curve(
        Sum(), x, attribution, torch.tensor([0]), block=1, output="logit", fractions=[1 / 3, 2 / 3]
    )
    assert curves.tolist() == [[-4, -6]]


def test_insertion_ends_where_deletion_starts(case) -> None:
    model, x, attributions, target = case
    options = {"block": 5, "fractions": (0, 0.25, 0.5, 0.75, 1), "baseline": "blur"}
    delete = perturbation_curve(model, x, attributions, target, order="least", **options)
    insert = perturbation_curve(model, x, attributions, target, insert=True, **options)
    assert torch.allclose(insert, delete.flip(1), atol=1e-12)  # 12 blocks: no fraction is rounded


def test_blur() -> None:
    x = torch.full((1, 2, 20, 24), 0.3, dtype=torch.float64)
    x[0, 0, 10, 12] = 1.3
    seen = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3))

    perturbation_curve(Recorder(), x, x[:, 0], torch.tensor([0]), fractions=[1], baseline="blur")
    blurred = seen[0][0]
    assert torch.allclose(blurred[1], x[0, 1])  # what is even stays, also at the border
    weights = [math.exp(-(d**2) / 50) for d in range(-5, 6)]
    for dy, dx in ((0, 0), (3, -5), (-5, 5)):
        expected = weights[dy + 5] * weights[dx + 5] / sum(weights) ** 2
        assert blurred[0, 10 + dy, 12 + dx].item() == pytest.approx(0.3 + expected)
    assert blurred[0, 10, 18].item() == pytest.approx(0.3)
    assert blurred[0].sum().item() == pytest.approx(0.3 * 480 + 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_model_is_unchanged(case, untouched, training: bool, inference: bool) -> None:
    model, x, attributions, target = case
    expected = perturbation_curve(model, x, attributions, target, block=4)
    model.train(training)
    before = x.clone()
    with untouched(model), torch.inference_mode(inference):
        curves = perturbation_curve(model, x, attributions.requires_grad_(not inference), target, block=4)
    assert torch.allclose(curves, expected, atol=1e-12)
    assert not curves.requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("curve", "fractions", "area"),
    [
        ([1.0, 1.0, 1.0], (0, 0.3, 0.8), 1.0),
        ([1.0, 0.0], (0, 0.8), 0.5),
        ([1.0, 0.5, 0.0], (0.0, 0.25, 1.0), 0.375),  # 0.75 · 0.25 + 0.25 · 0.75
        ([2.0, -2.0, 0.0], (0.2, 0.4, 0.8), -2 / 3),  # (0 · 0.2 − 1 · 0.4) / 0.6
        ([math.nan, 1.0], (0, 1), math.nan),
    ],
    ids=["constant", "line", "uneven", "not-from-0", "nan"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_area_by_hand(curve: list[float], fractions: tuple[float, ...], area: float, dtype: torch.dtype) -> None:
    areas = area_under_curve(torch.tensor([curve, curve], dtype=dtype), fractions)
    assert areas.dtype == dtype
    assert areas.tolist() == pytest.approx([area, area], nan_ok=True)


X = torch.rand(2, 3, 4, 5)
MAP, TARGET = torch.ones(2, 4, 5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], MAP, TARGET), {}, r"x must be .* got torch.float32 \(3, 4, 5\)"),
        ((X.int(), MAP, TARGET), {}, "x must be a floating-point tensor"),
        ((X, MAP.mT, TARGET), {}, r"must be \(N, H, W\) = \(2, 4, 5\), got \(2, 5, 4\)"),
        ((X, MAP[:, None], TARGET), {}, r"got \(2, 1, 4, 5\)"),
        ((X, MAP, TARGET[:1]), {}, r"target must be 2 integers, got torch.int64 \(1,\)"),
        ((X, MAP, TARGET.float()), {}, "target must be 2 integers, got torch.float32"),
        ((X, MAP, TARGET + 1), {}, "target 2 is out of range, allowed are 0 to 1"),
        ((X, MAP, TARGET), {"order": "mots"}, "order='mots' must be most or least; did you mean most?"),
        ((X, MAP, TARGET), {"output": "logits"}, "output='logits' must be probability or logit; did you mean logit?"),
        ((X, MAP, TARGET), {"block": 0}, "block=0: an integer of at least 1"),
        ((X, MAP, TARGET), {"batch_size": 0}, "batch_size=0: an integer of at least 1"),
        ((X, MAP, TARGET), {"fractions": (0, 1.1)}, r"numbers in \[0, 1\], at least one; got \[0, 1.1\]"),
        ((X, MAP, TARGET), {"fractions": ()}, r"at least one; got \[\]"),
        ((X, MAP, TARGET), {"baseline": "blurr"}, "baseline='blurr' must be .* did you mean blur?"),
        ((X, MAP, TARGET), {"baseline": torch.ones(5, 4)}, r"baseline \(5, 4\) can't be broadcast to \(2, 3, 4, 5\)"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value)[:30],
)
def test_mistakes(arguments: tuple[Tensor, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturbation_curve(Sum(), *arguments, **options)


@pytest.mark.parametrize(
    ("curves", "fractions", "message"),
    [
        (torch.ones(3), (0, 1), r"must be \(\*, 2\), one value per fraction; got \(3,\)"),
        (torch.ones(2), (0.5, 0.5), "at least two increasing numbers"),
        (torch.ones(1), (0.5,), "at least two increasing numbers"),
    ],
    ids=["length", "equal", "single"],
)
def test_area_mistakes(curves: Tensor, fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        area_under_curve(curves, fractions)
