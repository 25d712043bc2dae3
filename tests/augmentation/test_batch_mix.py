"""MixUp and CutMix against their definitions."""

import pytest
import torch
from bcos.data.transforms import RandomCutmix, RandomMixup
from torch import Tensor
from torch.nn.functional import one_hot

from bcos_train.augmentation import BatchMix


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 4


def test_off_is_the_identity(batch: tuple[Tensor, Tensor]) -> None:
    mix = BatchMix(4)
    images, labels = mix(*batch)
    assert images is batch[0]
    assert labels is batch[1]


def test_mixup_is_a_weighted_mean_with_the_neighbor(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    before = images.clone()
    torch.manual_seed(0)
    mixed, soft = BatchMix(5, mixup_alpha=0.4)(images, labels)
    hard = one_hot(labels, 5).float()
    weight = ((soft - hard.roll(1, 0)) / (hard - hard.roll(1, 0)))[0, 0].item()
    assert 0 < weight < 1
    torch.testing.assert_close(soft, weight * hard + (1 - weight) * hard.roll(1, 0))
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0))
    assert torch.equal(images, before)


def test_cutmix_labels_are_the_shares_of_the_area(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    torch.manual_seed(1)
    mixed, soft = BatchMix(5, cutmix_alpha=1.0)(images, labels)
    own = (mixed == images).all(1)
    other = (mixed == images.roll(1, 0)).all(1)
    assert torch.equal(own, ~other)
    share = own[0].float().mean()
    assert 0 < share < 1
    hard = one_hot(labels, 5).float()
    torch.testing.assert_close(soft, share * hard + (1 - share) * hard.roll(1, 0))


def test_weights_are_distributed_like_the_official_ones() -> None:
    images, labels = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    for ours, theirs in (
        (BatchMix(2, mixup_alpha=0.2), RandomMixup(2, p=1.0, alpha=0.2)),
        (BatchMix(2, cutmix_alpha=1.0), RandomCutmix(2, p=1.0, alpha=1.0)),
    ):
        torch.manual_seed(0)
        mine, other = (torch.stack([mix(images, labels)[1][0, 0] for _ in range(1500)]) for mix in (ours, theirs))
        quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
        torch.testing.assert_close(mine.mean(), other.mean(), atol=0.05, rtol=0)
        torch.testing.assert_close(mine.quantile(quantiles), other.quantile(quantiles), atol=0.12, rtol=0)


def test_both_take_turns(batch: tuple[Tensor, Tensor]) -> None:
    mix = BatchMix(4, mixup_alpha=1.0, cutmix_alpha=1.0)
    torch.manual_seed(0)
    images, _ = batch
    cut = 0
    for _ in range(200):
        mixed, soft = mix(*batch)
        assert torch.allclose(soft.sum(1), torch.ones(6))
        cut += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert 60 < cut < 140


def test_the_seed_decides(batch: tuple[Tensor, Tensor]) -> None:
    mix = BatchMix(4, mixup_alpha=0.2, cutmix_alpha=1.0)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(*batch)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_six_channels_equal_mixing_before_the_encoding(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    mix = BatchMix(4, mixup_alpha=0.5)
    torch.manual_seed(3)
    before, _ = mix(images, labels)
    torch.manual_seed(3)
    after, _ = mix(torch.cat([images, 1 - images], 1), labels)
    torch.testing.assert_close(after, torch.cat([before, 1 - before], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_classes": 3, "mixup_alpha": -0.1}, "mixup_alpha must be 0"),
        ({"num_classes": 3, "cutmix_alpha": -1.0}, "cutmix_alpha must be 0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchMix(**arguments)


def test_uint8_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="must be float"):
        BatchMix(2, mixup_alpha=1.0)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))


def test_repr() -> None:
    assert "mixup_alpha=0.2, cutmix_alpha=1.0" in repr(BatchMix(10, 0.2, 1.0))
