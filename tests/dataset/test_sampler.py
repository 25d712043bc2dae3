"""Which sample goes where: against slow references, the official sampler, and by exhaustion."""

import math
from itertools import product

import pytest
import torch
from bcos.data.sampler import RASampler

from bcos_train.dataset.randomness import epoch_length, epoch_order
from bcos_train.dataset.sampler import EvalBatchSampler, TrainBatchSampler


def _indices(sampler: TrainBatchSampler) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in sampler]


@pytest.mark.parametrize("repetitions", [1, 2, 3])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("n", [1, 7, 24, 61, 300])
def test_shares_make_up_the_global_batches(n: int, world_size: int, accumulate: int, repetitions: int) -> None:
    size, parts = 24, world_size * accumulate
    ranks = [
        _indices(TrainBatchSampler(n, size, world_size, rank, accumulate, seed=5, repetitions=repetitions))
        for rank in range(world_size)
    ]
    order = epoch_order(5, 0, n, repetitions).tolist()
    for step in range(math.ceil(len(order) / size)):
        whole = order[step * size : (step + 1) * size]
        extra = 0
        while len(whole) % parts:
            whole.append(order[extra % len(order)])
            extra += 1
        for rank in range(world_size):
            micro = ranks[rank][step * accumulate : (step + 1) * accumulate]
            assert [index for part in micro for index in part] == whole[rank::world_size]
            assert len({len(part) for part in micro}) == 1
    assert {len(batches) for batches in ranks} == {math.ceil(len(order) / size) * accumulate}


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)], ids=str)
def test_a_step_has_the_same_samples_and_augmentation_however_it_is_split(parts: tuple[int, int]) -> None:
    world_size, accumulate = parts
    whole = [sorted(batch) for batch in TrainBatchSampler(80, 16, seed=1)]
    shares = [list(TrainBatchSampler(80, 16, world_size, rank, accumulate, seed=1)) for rank in range(world_size)]
    for step, keys in enumerate(whole):
        together = [
            key for share in shares for part in share[step * accumulate : (step + 1) * accumulate] for key in part
        ]
        assert sorted(together) == keys


@pytest.mark.parametrize("repetitions", [1, 3])
def test_no_two_samples_of_an_epoch_share_their_augmentation(repetitions: int) -> None:
    sampler = TrainBatchSampler(301, 64, world_size=2, rank=1, accumulate=2, seed=1, repetitions=repetitions)
    seeds = [seed for batch in sampler for _, seed in batch]
    sampler.set_epoch(1)
    seeds += [seed for batch in sampler for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_padding_gets_other_augmentations() -> None:
    (batch,) = TrainBatchSampler(3, 8, world_size=1, accumulate=1, seed=0)
    assert len(batch) == 3
    first, second = TrainBatchSampler(3, 8, accumulate=2)
    assert len(first) == len(second) == 2
    assert second[1][0] == first[0][0]
    assert second[1][1] != first[0][1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n", [256, 300, 1000])
def test_repeated_augmentation_equals_the_official_sampler(
    monkeypatch: pytest.MonkeyPatch, n: int, world_size: int
) -> None:
    permutation = epoch_order(9, 2, n)
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: permutation)
    for rank in range(world_size):
        official = RASampler(range(n), world_size, rank, repetitions=3)
        ours = TrainBatchSampler(n, 64, world_size, rank, seed=9, repetitions=3)
        ours.set_epoch(2)
        assert [index for batch in _indices(ours) for index in batch] == list(official)
        assert len(official) == epoch_length(n, 3) // world_size


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_start_step_gives_the_rest_of_the_epoch(accumulate: int, drop_last: bool) -> None:
    sampler = TrainBatchSampler(50, 8, accumulate=accumulate, seed=4, drop_last=drop_last)
    assert sampler.steps_per_epoch == (6 if drop_last else 7)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert len(whole) == len(sampler)
    for step in range(sampler.steps_per_epoch + 1):
        sampler.seek(3, step)
        assert list(sampler) == whole[step * accumulate :]
        assert len(sampler) == len(whole)


def test_only_the_resumed_epoch_starts_late() -> None:
    sampler = TrainBatchSampler(50, 10)
    sampler.seek(2, 3)
    assert (sampler.epoch, sampler.start_step) == (2, 3)
    sampler.set_epoch(0)
    assert sampler.start_step == 0
    sampler.set_epoch(2)
    assert sampler.start_step == 3
    sampler.set_epoch(3)
    assert sampler.start_step == 0
    sampler.seek(3, 1)
    assert len(list(sampler)) == 4
    assert sampler.sampler is sampler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 10, "world_size": 4}, "multiple of 4, for instance 8 or 12"),
        ({"global_batch_size": 8, "world_size": 2, "accumulate": 3}, "multiple of 6, for instance 6 or 12"),
        ({"global_batch_size": 1, "world_size": 2}, "multiple of 2, for instance 2$"),
        ({"global_batch_size": 200, "drop_last": True}, "drop_last=true leaves no batch"),
        ({"global_batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"global_batch_size": 4, "repetitions": 0}, "repetitions must be at least 1"),
        ({"global_batch_size": 4, "world_size": 2, "rank": 2}, "rank must be in 0 … 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_sizes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainBatchSampler(100, **arguments)


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (0, 11)])
def test_seeking_outside(epoch: int, step: int) -> None:
    with pytest.raises(ValueError, match="an epoch has 10 optimizer steps"):
        TrainBatchSampler(100, 10).seek(epoch, step)


def test_evaluation_sees_every_sample_once() -> None:
    for n, world_size, batch_size in product(range(40), range(1, 9), (1, 2, 3, 7, 50)):
        samplers = [EvalBatchSampler(n, batch_size, world_size, rank) for rank in range(world_size)]
        batches = [list(sampler) for sampler in samplers]
        assert sorted(index for rank in batches for batch in rank for index in batch) == list(range(n))
        assert [len(sampler) for sampler in samplers] == [len(rank) for rank in batches]
        assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_wrong_evaluation_sizes() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        EvalBatchSampler(3, 0)
    with pytest.raises(ValueError, match="rank must be in 0 … 0"):
        EvalBatchSampler(3, 1, rank=1)
