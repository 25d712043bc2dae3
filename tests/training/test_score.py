"""Loss and accuracy over an epoch, compared with a loop over the samples."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from bcos_train.training.score import ClassificationScore, MultiLabelScore, score_names


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


def test_groups_against_a_loop() -> None:
    torch.manual_seed(3)
    names = ["a on x", "a on y", "b on x", "nobody"]
    score, correct, counts = ClassificationScore(names), [0] * 4, [0] * 4
    for size in (30, 1, 9):
        logits, labels, groups = torch.randn(size, 3), torch.randint(3, (size,)), torch.randint(3, (size,))
        score.update(torch.rand(()), logits, labels, groups)
        for row, label, group in zip(logits, labels, groups, strict=True):
            counts[group] += 1
            correct[group] += int(row.argmax() == label)
    result = score.compute()
    shares = [100 * c / n for c, n in zip(correct[:3], counts[:3], strict=True)]
    assert [result[f"group_acc1/{name}"] for name in ("a_on_x", "a_on_y", "b_on_x")] == pytest.approx(shares)
    assert result["worst_group_acc1"] == pytest.approx(min(shares))
    assert "group_acc1/nobody" not in result
    assert {*result} - {"count", *score_names(False, names, True)} == set()
    score.reset()
    assert math.isnan(score.compute()["worst_group_acc1"])


def test_state_without_groups_is_unchanged() -> None:
    assert set(ClassificationScore().state_dict()) == {"loss_sum", "correct1", "correct5", "count"}
    assert set(MultiLabelScore(average_precision=True).state_dict()) == set(MultiLabelScore().state_dict())


@pytest.mark.parametrize("num_classes", [1, 2, 6])
def test_multi_label_score_against_references(num_classes: int) -> None:
    torch.manual_seed(4)
    score, parts = MultiLabelScore(average_precision=True), []
    for size in (17, 1, 8):
        logits, target = 20 * torch.randn(size, num_classes), (torch.rand(size, num_classes) < 0.3).float()
        if num_classes == 6:
            target[:, 4] = 0  # a class without a positive sample
        loss = torch.rand(())
        score.update(loss, logits, target)
        parts.append((loss, logits, target))
    result = score.compute()
    logits, target = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    assert result["count"] == 26
    assert result["loss"] == pytest.approx(sum(float(loss) * len(rows) for loss, rows, _ in parts) / 26)
    assert result["f1"] == pytest.approx(100 * f1_score(target.flatten(), logits.flatten() >= 0))
    columns = [k for k in range(num_classes) if target[:, k].any()]
    precisions = [average_precision_score(target[:, k], logits[:, k]) for k in columns]
    assert result["map"] == pytest.approx(100 * sum(precisions) / len(precisions))
    assert set(result) == {"count", *score_names(True, None, True)}


def test_multi_label_score_by_hand() -> None:
    score = MultiLabelScore()
    # A logit of 0 is a prediction: 2 hits, 1 false alarm, 1 miss.
    score.update(torch.tensor(0.5), torch.tensor([[0.0, -1.0], [2.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert score.compute() == {"loss": 0.5, "f1": pytest.approx(100 * 4 / 6), "count": 2}
    empty = MultiLabelScore(average_precision=True).compute()
    assert (empty["f1"], math.isnan(empty["map"])) == (0, True)
