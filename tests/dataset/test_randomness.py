"""Counter-based randomness: fixed values, independence, and the generators left as they were."""

import contextlib
import random

import numpy as np
import pytest
import torch

from bcos_train.dataset.randomness import (
    Stream,
    derive_seed,
    epoch_length,
    epoch_order,
    index_words,
    isolated_rng,
    permutation,
    sample_seeds,
    seed_generators,
    step_seed,
)

_MASK = 2**64 - 1


def _splitmix64(key: int, counter: int) -> int:
    """SplitMix64 in plain Python integers: the state advanced counter + 1 times from key, then mixed."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_frozen_values() -> None:
    # A change here changes every run: old runs could not be resumed or repeated.
    assert derive_seed(0) == 3717377837946358015
    assert derive_seed(0, 1) == 5623719847981781756
    assert epoch_order(0, 0, 8).tolist() == [7, 5, 6, 4, 1, 3, 0, 2]
    assert sample_seeds(0, 0, np.arange(2)).tolist() == [7217539652519815653, 3990958870306025441]


def test_splitmix_reference_vector() -> None:
    # First outputs of the published generator from state 0.
    assert [_splitmix64(0, i) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_sample_seeds_equal_plain_integers() -> None:
    key = derive_seed(3, Stream.AUGMENTATION, 5)
    expected = [_splitmix64(key, index | (repetition << 40)) >> 1 for index, repetition in ((0, 0), (7, 0), (7, 2))]
    assert sample_seeds(3, 5, np.array([0, 7, 7]), np.array([0, 0, 2])).tolist() == expected


def test_index_words_equal_plain_integers() -> None:
    key = derive_seed(3, Stream.POSITIVE_CLASS, 5)
    indices = [0, 1, 7, 10**6, 2**40]
    expected = [_splitmix64(key, index) >> 1 for index in indices]
    assert index_words(torch.tensor(indices), 3, Stream.POSITIVE_CLASS, 5).tolist() == expected


def test_order_equals_plain_sorting() -> None:
    key = derive_seed(3, Stream.ORDER, 5)
    assert epoch_order(3, 5, 500).tolist() == sorted(range(500), key=lambda i: _splitmix64(key, i))


@pytest.mark.parametrize("other", [(1,), (1, 0), (0, 1), (2**32,), (1, 2, 0), (0, 0, 1)], ids=str)
def test_streams_differ(other: tuple[int, ...]) -> None:
    assert derive_seed(1, *other) != derive_seed(1)
    assert derive_seed(1, *other) != derive_seed(1, 1, 2)


def test_seeds_do_not_repeat() -> None:
    seeds = {derive_seed(s, stream, i) for s in range(10) for stream in Stream for i in range(20)}
    assert len(seeds) == 10 * len(Stream) * 20
    assert len({step_seed(0, step, rank) for step in range(50) for rank in range(8)}) == 400
    many = sample_seeds(0, 0, np.repeat(np.arange(20_000), 3), np.tile(np.arange(3), 20_000))
    assert len(set(many.tolist())) == 60_000
    assert many.min() >= 0


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_seed_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\^64\)"):
        derive_seed(bad)
    with pytest.raises(ValueError, match=str(bad)):
        derive_seed(0, bad)


def test_orders_are_permutations_and_look_uniform() -> None:
    orders = np.stack([permutation(10, seed, Stream.ORDER) for seed in range(4000)])
    assert (np.sort(orders, axis=1) == np.arange(10)).all()
    # 400 expected in each cell, standard deviation 19.
    counts = np.stack([np.bincount(column, minlength=10) for column in orders.T])
    assert abs(counts - 400).max() < 100


def test_epochs_and_seeds_change_the_order() -> None:
    orders = [tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize(
    ("n", "repetitions", "length"), [(1000, 1, 1000), (1000, 3, 768), (256, 3, 256), (255, 3, 255), (3, 2, 3)]
)
def test_epoch_length(n: int, repetitions: int, length: int) -> None:
    assert epoch_length(n, repetitions) == length
    order = epoch_order(0, 0, n, repetitions).tolist()
    single = epoch_order(0, 0, n).tolist()
    assert order == [index for index in single for _ in range(repetitions)][:length]


def _draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_isolated_rng() -> None:
    seed_generators(1)
    expected = _draw()
    seed_generators(1)
    with isolated_rng(7):
        inside = _draw()
    assert _draw() == expected
    with isolated_rng(7):
        assert _draw() == inside
    assert inside != expected


def test_isolated_rng_restores_after_an_error() -> None:
    seed_generators(1)
    expected = _draw()
    seed_generators(1)
    with contextlib.suppress(KeyError), isolated_rng(7):
        _draw()
        raise KeyError
    assert _draw() == expected
