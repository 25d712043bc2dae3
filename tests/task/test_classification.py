"""Tasks, and their interface with the training loop."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from training.runs import metric_rows
from training.toys import TinyNet, fit, make_data, make_module

from bcos_train.loss import CrossEntropy
from bcos_train.task import Classification, Network, Task, TaskOutput, TrainingBatch


def batch(n: int = 4) -> TrainingBatch:
    rgb = torch.rand(n, 3, 8, 8)
    return TrainingBatch(torch.cat([rgb, 1 - rgb], 1), torch.arange(n) % 3, rgb, torch.arange(n))


def test_classification_is_the_loss_of_the_logits() -> None:
    network, images = Network(nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 3))), batch()
    output = Classification(CrossEntropy())(network, images)
    assert torch.equal(output.logits, network(images.x))
    torch.testing.assert_close(output.loss, F.cross_entropy(network(images.x), images.target))
    assert output.logs == {}


class WithTeacher(Task):
    """Match a teacher outside the module tree; reads the extras of the batch and logs a scalar."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teachers = [teacher]
        self.seen: list[TrainingBatch] = []

    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        self.seen.append(batch)
        logits = network(batch.x)
        with torch.no_grad():
            expected = self.teachers[0](batch.x)
        loss = F.mse_loss(logits, expected)
        return TaskOutput(loss, logits, {"distance": loss.detach()})


def test_another_objective_needs_no_change_in_the_loop(tmp_path: Path) -> None:
    data = make_data()
    torch.manual_seed(3)
    teacher = TinyNet(data.num_classes)
    task = WithTeacher(teacher)
    module = make_module(data, task=task)
    teacher.eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    fit(tmp_path, data=data, module=module)
    assert all(isinstance(item, TrainingBatch) and item.extras is None for item in task.seen)
    logged = [float(row["train/distance"]) for row in metric_rows(tmp_path) if row.get("train/distance")]
    assert len(logged) == len(task.seen)
    assert min(logged) > 0
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("teacher" in key for key in module.state_dict())
