"""Loss and accuracy over an epoch, compared with a loop over the samples."""

import pytest
import torch
from torch import nn

from bcos_train.training.module import ClassificationScore


@pytest.mark.parametrize("num_classes", [2, 3, 5, 20])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
def test_score_against_a_loop(soft: bool, num_classes: int) -> None:
    torch.manual_seed(1)
    score = ClassificationScore()
    losses, top1, top5 = [], 0, 0
    for size in (7, 1, 4):
        logits, labels = torch.randn(size, num_classes), torch.randint(num_classes, (size,))
        target = nn.functional.one_hot(labels, num_classes) * 0.6 + 0.4 / num_classes if soft else labels
        loss = torch.rand(())
        score.update(loss, logits, target)
        for row, label in zip(logits, labels, strict=True):
            losses.append(float(loss))
            rank = sorted(range(num_classes), key=lambda k: -row[k]).index(int(label))
            top1 += rank < 1
            top5 += rank < 5
    result = score.compute()
    assert result == {
        "loss": pytest.approx(sum(losses) / 12),
        "acc1": pytest.approx(100 * top1 / 12),
        "acc5": pytest.approx(100 * top5 / 12),
        "count": 12,
    }
    if num_classes <= 5:
        assert result["acc5"] == 100


def test_score_persists_in_the_middle_of_an_epoch() -> None:
    torch.manual_seed(2)
    parts = [(torch.rand(()), torch.randn(5, 4), torch.randint(4, (5,))) for _ in range(4)]
    whole, first, second = ClassificationScore(), ClassificationScore(), ClassificationScore()
    for part in parts:
        whole.update(*part)
    for part in parts[:2]:
        first.update(*part)
    second.load_state_dict(first.state_dict())
    for part in parts[2:]:
        second.update(*part)
    assert second.compute() == whole.compute()
    second.reset()
    assert second.compute() == {"loss": 0.0, "acc1": 0.0, "acc5": 0.0, "count": 0}


def test_score_of_many_samples_is_exact() -> None:
    """A sum in float32 would stop growing."""
    score = ClassificationScore()
    score.loss_sum += 2.0**25
    score.count += 2**25
    score.update(torch.tensor(1.0), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert float(score.loss_sum) == 2**25 + 1
