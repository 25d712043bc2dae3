"""Stability under shifts and noise, against loops over single maps and for methods with known scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.linear import Bcos, InputXGradient
from bcos_train.metric import noise_stability, shift_stability
from bcos_train.nn import BcosConv2d


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(BcosConv2d(6, 8, 3, padding=1), nn.Dropout(0.5), BcosConv2d(8, 5, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 11, 14, dtype=torch.float64)
    return Net().double().eval(), torch.cat([image, 1 - image], 1), torch.tensor([[0, 3, 3], [4, 1, 0]])


def pixels(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Method that follows the image."""
    return x[:, :1].expand(-1, targets.shape[1], -1, -1)


def place(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Method that depends on the position only, increasing from left to right."""
    return torch.arange(x.shape[3], dtype=x.dtype).expand(len(x), targets.shape[1], *x.shape[2:])


def constant(value: float):
    return lambda model, x, targets: x.new_full((len(x), targets.shape[1], *x.shape[2:]), value)


def slow_cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().tolist(), b.flatten().tolist()
    product = sum(p * q for p, q in zip(a, b, strict=True))
    return product / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def test_shift_equals_the_loop(case) -> None:
    model, x, targets = case
    method, shift = Bcos(), 3
    stability = shift_stability(method, model, x, targets, shift=shift)
    original = method(model, x, targets)
    for n in range(2):
        for t in range(3):
            similarities = []
            for dy, dx in ((0, 3), (0, -3), (3, 0), (-3, 0)):
                moved = torch.empty_like(x[n])
                for row in range(11):
                    for column in range(14):
                        source = min(max(row - dy, 0), 10), min(max(column - dx, 0), 13)
                        moved[:, row, column] = x[n, :, source[0], source[1]]
                found = method(model, moved[None], targets[n : n + 1])[0, t]
                back = torch.tensor(
                    [[found[row + dy, column + dx].item() for column in range(3, 11)] for row in range(3, 8)]
                )
                similarities.append(slow_cosine(original[n, t, 3:8, 3:11], back))
            assert stability[n, t].item() == pytest.approx(sum(similarities) / 4, abs=1e-6)


def test_shift_of_known_methods(case) -> None:
    model, x, targets = case
    assert torch.allclose(shift_stability(pixels, model, x, targets), torch.ones(2, 3, dtype=torch.float64))
    # On columns 1, 2 of four: [1, 2] against itself twice, [0, 1] and [2, 3] when shifted left and right.
    stability = shift_stability(place, model, torch.rand(1, 6, 5, 4), targets[:1], shift=1)
    cosines = [1, 1, 2 / math.sqrt(5), 8 / math.sqrt(5 * 13)]
    assert stability[0].tolist() == pytest.approx([sum(cosines) / 4] * 3)


@pytest.mark.parametrize("stability", [shift_stability, noise_stability])
@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (-1.0, 1.0), (1e-30, 1.0), (1e30, 1.0)],
    ids=str,
)
def test_maps_of_one_value(case, stability, value: float, expected: float) -> None:
    model, x, targets = case
    scores = stability(constant(value), model, x.float(), targets)
    assert scores.dtype == torch.float32
    assert scores.shape == (2, 3)
    assert torch.allclose(scores, torch.tensor(expected))


def test_noise_equals_the_loop(case) -> None:
    model, x, targets = case
    method = InputXGradient()
    stability = noise_stability(method, model, x, targets, std=0.3, n_samples=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(3, 11, 14, generator=generator) for _ in range(3)]
    for n in range(2):
        for t in range(3):
            original = method(model, x[n : n + 1], targets[n : n + 1, t : t + 1])
            similarities = []
            for noise in noises:
                image = (x[n, :3] + 0.3 * noise.double()).clamp(0, 1)
                noisy = torch.cat([image, 1 - image])[None]
                similarities.append(slow_cosine(original, method(model, noisy, targets[n : n + 1, t : t + 1])))
            assert stability[n, t].item() == pytest.approx(sum(similarities) / 3)


def test_noise_of_standardized_input_is_not_clamped(case) -> None:
    x = torch.full((1, 3, 40, 50), -2.0, dtype=torch.float64)
    seen = []

    def record(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        seen.append(x)
        return x[:, :1]

    noise_stability(record, case[0], x, torch.tensor([[0]]), std=0.5, n_samples=1)
    assert torch.equal(seen[0], x)
    assert (seen[1] - x).std().item() == pytest.approx(0.5, rel=0.05)
    assert (seen[1] - x).mean().item() == pytest.approx(0, abs=0.05)


def test_noise_depends_on_the_seed_and_not_on_the_batch(case) -> None:
    model, x, targets = case
    scores = noise_stability(Bcos(), model, x, targets)
    assert torch.equal(scores, noise_stability(Bcos(), model, x, targets, seed=0))
    assert not torch.equal(scores, noise_stability(Bcos(), model, x, targets, seed=1))
    alone = noise_stability(Bcos(), model, x[1:], targets[1:])
    assert torch.allclose(alone, scores[1:], atol=1e-12)
    assert torch.allclose(noise_stability(Bcos(), model, x, targets, std=0), torch.ones(2, 3, dtype=torch.float64))
    louder = noise_stability(Bcos(), model, x, targets, std=0.5)
    assert (louder < scores).all()


@pytest.mark.parametrize("stability", [shift_stability, noise_stability])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_unchanged(case, untouched, stability, training: bool, inference: bool) -> None:
    model, x, targets = case
    expected = stability(Bcos(), model, x, targets)
    model.train(training)
    before = x.clone()
    with untouched(model), torch.inference_mode(inference):
        scores = stability(Bcos(), model, x.clone(), targets.clone())
    assert torch.allclose(scores, expected, atol=1e-12)
    assert torch.equal(x, before)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0}, "shift=0: an integer of at least 1"),
        ({"shift": 6}, "shift=6 is too large for an image of 11x14 pixels"),
        ({"std": -1}, "std=-1 must be at least 0"),
        ({"std": math.nan}, "std=nan must be at least 0"),
        ({"n_samples": 0}, "n_samples=0: an integer of at least 1"),
    ],
    ids=str,
)
def test_mistakes(case, options: dict, message: str) -> None:
    stability = shift_stability if "shift" in options else noise_stability
    with pytest.raises(ValueError, match=message):
        stability(pixels, *case, **options)


@pytest.mark.parametrize("stability", [shift_stability, noise_stability])
def test_wrong_shapes(case, stability) -> None:
    model, x, targets = case
    with pytest.raises(ValueError, match=r"x must be .*\(N, C, H, W\)"):
        stability(pixels, model, x[0], targets)
    with pytest.raises(ValueError, match=r"targets must be integers \(2, T\)"):
        stability(pixels, model, x, targets[0])


def test_replicated_border_is_what_pad_gives() -> None:
    """The pixel-by-pixel reference above equals ``F.pad``, which checks the reference itself."""
    row = torch.arange(4.0).view(1, 1, 1, 4)
    assert F.pad(row, [2, 2, 0, 0], mode="replicate").flatten().tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
