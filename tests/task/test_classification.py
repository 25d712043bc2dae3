"""Tasks, and their interface with the training loop."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training.runs import metric_rows
from training.toys import TinyNet, fit, make_data, make_module

from bcos_train.dataset.batch import Batch
from bcos_train.loss import CrossEntropy
from bcos_train.task import Classification, Task, TaskOutput


def batch(n: int = 4) -> Batch:
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return Batch(images, torch.arange(n) % 3, torch.arange(n))


def test_classification_is_the_loss_of_the_logits() -> None:
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 3)), torch.rand(4, 6, 8, 8)
    output = Classification(CrossEntropy())(network, x, batch().labels, batch())
    assert torch.equal(output.logits, network(x))
    torch.testing.assert_close(output.loss, F.cross_entropy(network(x), batch().labels))
    assert output.logs == {}


class WithTeacher(Task):
    """Match a teacher outside the module tree; reads the extras of the batch and logs a scalar."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teachers = [teacher]
        self.seen: list[Batch] = []

    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: Batch) -> TaskOutput:
        self.seen.append(batch)
        logits = network(x)
        with torch.no_grad():
            expected = self.teachers[0](x)
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
    assert all(isinstance(item, Batch) and item.extras is None for item in task.seen)
    logged = [float(row["train/distance"]) for row in metric_rows(tmp_path) if row.get("train/distance")]
    assert len(logged) == len(task.seen)
    assert min(logged) > 0
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("teacher" in key for key in module.state_dict())
