"""Percentile bootstrap intervals: by hand, one resample at a time, and against SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bcos_train.metric import Interval, bootstrap, bootstrap_interval

SCORES = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("shape", [(30,), (10, 3), (5, 2, 3)], ids=str)
def test_equals_the_loop(statistic: str, shape: tuple[int, ...]) -> None:
    scores = SCORES.view(shape)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(200):
        drawn = torch.cat([scores[i].flatten() for i in torch.randint(len(scores), shape[:1], generator=generator)])
        ordered = sorted(drawn.tolist())
        found.append(sum(ordered) / 30 if statistic == "mean" else (ordered[14] + ordered[15]) / 2)
    expected = torch.quantile(torch.tensor(found, dtype=torch.float64), torch.tensor([0.05, 0.95], dtype=torch.float64))
    interval = bootstrap_interval(scores, statistic, confidence=0.9, n_resamples=200, seed=3)
    assert interval == pytest.approx(tuple(expected.tolist()), rel=1e-9)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_agrees_with_scipy(statistic: str) -> None:
    function = {"mean": np.mean, "median": np.median}[statistic]
    reference = stats.bootstrap(
        (SCORES.numpy(),), function, method="percentile", n_resamples=20000, random_state=0
    ).confidence_interval
    interval = bootstrap_interval(SCORES, statistic, n_resamples=20000)
    assert interval == pytest.approx((reference.low, reference.high), abs=0.01)
    assert interval.low < function(SCORES.numpy()) < interval.high


def test_by_hand() -> None:
    # Of two samples 0 and 1 the mean is 0, ½ and 1 with probabilities ¼, ½ and ¼; the median is the same.
    for statistic in ("mean", "median"):
        assert bootstrap_interval(torch.tensor([0.0, 1.0]), statistic, confidence=0.95) == (0.0, 1.0)
        assert bootstrap_interval(torch.tensor([0.0, 1.0]), statistic, confidence=0.4) == (0.5, 0.5)


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("scores", [[0.1], [0.1] * 10, [0.7] * 3], ids=["one", "ten-equal", "three-equal"])
def test_degenerate(scores: list[float], statistic: str) -> None:
    value = torch.tensor(scores, dtype=torch.float64)
    assert bootstrap_interval(value, statistic) == Interval(scores[0], scores[0])


def test_scores_of_a_sample_stay_together() -> None:
    # Each sample has the mean ½, so the mean of all is certain; alone, its scores would vary.
    scores = torch.tensor([[0.0, 1.0]] * 20)
    assert bootstrap_interval(scores) == (0.5, 0.5)
    low, high = bootstrap_interval(scores.flatten())
    assert low < 0.4 < 0.6 < high


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_not_finite_scores_give_nan(bad: float) -> None:
    assert all(math.isnan(bound) for bound in bootstrap_interval(torch.tensor([0.5, bad])))


def test_seed_and_random_state() -> None:
    before = torch.get_rng_state()
    first = bootstrap_interval(SCORES)
    assert first == bootstrap_interval(SCORES, seed=0) != bootstrap_interval(SCORES, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        assert bootstrap_interval(SCORES.float()) == pytest.approx(first, rel=1e-5)


def test_many_samples_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bootstrap_interval(SCORES, n_resamples=50)
    monkeypatch.setattr(bootstrap, "_CHUNK_SIZE", 70)
    assert bootstrap_interval(SCORES, n_resamples=50) == expected


def test_coverage_of_the_true_mean_equals_the_confidence() -> None:
    generator = torch.Generator().manual_seed(0)
    intervals = [bootstrap_interval(torch.randn(40, generator=generator), n_resamples=400) for _ in range(200)]
    assert 0.88 < sum(low < 0 < high for low, high in intervals) / 200 < 0.99


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(0), {}, r"at least one sample, got \(0,\)"),
        (torch.tensor(1.0), {}, r"at least one sample, got \(\)"),
        (SCORES, {"statistic": "meen"}, "must be mean or median; did you mean mean?"),
        (SCORES, {"confidence": 95}, "confidence=95 must be between 0 and 1"),
        (SCORES, {"n_resamples": 0}, "n_resamples=0 at least 1"),
    ],
    ids=["empty", "scalar", "statistic", "confidence", "resamples"],
)
def test_mistakes(scores: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(scores, **options)
