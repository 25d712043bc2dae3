"""Counter-based randomness: every random number of a run is a function of a few integers.

The order of an epoch is f(seed, epoch), a sample's augmentation f(seed, epoch, index, repetition), a step's dropout,
stochastic depth and mixup f(seed, step, rank). No generator state has to be saved: a run resumes bit-identically after
any batch, with any number of workers.

Only integer arithmetic with a stability guarantee is used (numpy's SeedSequence, the finalizer of SplitMix64 and a
stable sort), so the numbers are the same on every platform and with every version of torch and numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

__all__ = [
    "Stream",
    "derive_seed",
    "epoch_length",
    "epoch_order",
    "index_words",
    "isolated_rng",
    "permutation",
    "random_words",
    "sample_seeds",
    "seed_generators",
    "step_seed",
    "torch_random_words",
]

_WORD = 0xFFFFFFFF
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# The official sampler for repeated augmentation draws a multiple of 256 samples per epoch.
_REPEATED_MULTIPLE = 256


class Stream(IntEnum):
    """Purpose of a derived seed. Every run's reproducibility depends on the numbers: add some, never change them."""

    ORDER = 1
    AUGMENTATION = 2
    STEP = 3
    SUBSET = 4
    SPLIT = 5
    COMPOSITION = 6
    ANNOTATED = 7
    SHOTS = 8
    POSITIVE_CLASS = 9
    SHARDS = 10
    REPLACEMENT = 11


def derive_seed(seed: int, *stream: int) -> int:
    """Return a well-mixed seed in [0, 2^63) for the stream ``stream``, e.g. ``(Stream.STEP, step, rank)``.

    Seeds of different tuples are independent, also if one tuple is a prefix of the other.

    Raises:
        ValueError: The seed or a part of the stream is outside [0, 2^64).
    """
    parts = (seed, *stream)
    for part in parts:
        if not 0 <= part < 2**64:
            raise ValueError(f"a seed and the parts of its stream must be in [0, 2^64), not {part}")
    # Two words per part, preceded by the number of parts: SeedSequence drops leading and trailing zeros.
    words = [len(parts), *(word for part in parts for word in (part & _WORD, part >> 32))]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of all random numbers on the device in optimizer step ``step`` of process ``rank``."""
    return derive_seed(seed, Stream.STEP, step, rank)


def _splitmix64(key: int, counters: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): outputs ``counters`` (any shape, uint64) of the stream ``key``."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_words(n: int, seed: int, *stream: int) -> np.ndarray:
    """Return ``n`` random integers, uint64 ``(n,)``; the first ones don't depend on ``n``."""
    return _splitmix64(derive_seed(seed, *stream), np.arange(n))


def index_words(indices: torch.Tensor, seed: int, *stream: int) -> torch.Tensor:
    """Return a random integer in [0, 2^63) for each of ``indices`` (N,): int64 (N,), on their device.

    These are the upper 63 bits of :func:`random_words` at the indices. Products of int64 wrap around as those of
    uint64, and nothing waits for the device.
    """
    z = derive_seed(seed, *stream) + (indices + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 1)


def _signed(word: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return word - (word >> 63 << 64)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift the bits of int64 to the right, filling up with zeros instead of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def permutation(n: int, seed: int, *stream: int) -> np.ndarray:
    """Return a random permutation of 0 … n-1, int64 ``(n,)``: the indices sorted by a 64-bit hash."""
    key = derive_seed(seed, *stream)
    return np.argsort(_splitmix64(key, np.arange(n)), kind="stable").astype(np.int64)


def epoch_length(n: int, repetitions: int = 1) -> int:
    """Return the number of samples drawn in an epoch.

    This is ``n`` without repeated augmentation; with it the largest multiple of 256 up to ``n``, as in the official
    RASampler (``n`` if below 256, where the official one would draw nothing).
    """
    if repetitions == 1 or n < _REPEATED_MULTIPLE:
        return n
    return n // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE


def epoch_order(seed: int, epoch: int, n: int, repetitions: int = 1) -> torch.Tensor:
    """Return the sample indices of one epoch in order: int64 ``(epoch_length(n, repetitions),)``.

    With ``repetitions`` R > 1 (repeated augmentation, Hoffer et al., arXiv 1901.09335) each index occurs R times in a
    row, so that the versions of a sample go to different processes; the sequence is truncated to ``epoch_length``.
    """
    order = permutation(n, seed, Stream.ORDER, epoch)
    return torch.from_numpy(np.repeat(order, repetitions)[: epoch_length(n, repetitions)])


def sample_seeds(seed: int, epoch: int, indices: np.ndarray, repetition: np.ndarray | int = 0) -> np.ndarray:
    """Return augmentation seeds in [0, 2^63), int64 ``(n,)``, for the ``repetition``-th use of ``indices`` ``(n,)``."""
    key = derive_seed(seed, Stream.AUGMENTATION, epoch)
    repetition = np.asarray(repetition, dtype=np.uint64)
    counters = indices.astype(np.uint64) | (repetition << np.uint64(40))
    return (_splitmix64(key, counters) >> np.uint64(1)).astype(np.int64)


def torch_random_words(seeds: np.ndarray, n: int) -> np.ndarray:
    """Return the first ``n`` numbers of torch's CPU generator for each of ``seeds`` (N,): uint32 (n, N), n in 1 … 227.

    This is the Mersenne Twister MT19937 (Matsumoto, Nishimura 1998) for all seeds at once: seeding torch's generator
    and drawing three numbers takes 15 µs per sample, this 1 µs.
    """
    assert 1 <= n <= 624 - 397, n
    state = seeds.astype(np.uint32)  # torch, too, uses the low 32 bits
    states = {0: state}
    for j in range(1, n + 397):
        state = np.uint32(1812433253) * (state ^ (state >> np.uint32(30))) + np.uint32(j)
        if j <= n or j >= 397:
            states[j] = state
    words = np.empty((n, len(seeds)), dtype=np.uint32)
    for i in range(n):
        twist = (states[i] & np.uint32(0x80000000)) | (states[i + 1] & np.uint32(0x7FFFFFFF))
        y = states[i + 397] ^ (twist >> np.uint32(1)) ^ (np.uint32(0x9908B0DF) * (states[i + 1] & np.uint32(1)))
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        words[i] = y ^ (y >> np.uint32(18))
    return words


def seed_generators(seed: int) -> None:
    """Seed the CPU generators of torch, ``random`` and numpy.

    Unlike ``torch.manual_seed``, this doesn't seed the generators of accelerators.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & _WORD)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the CPU generators of torch, ``random`` and numpy after the block; with a seed, seed them first."""
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        if seed is not None:
            seed_generators(seed)
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
