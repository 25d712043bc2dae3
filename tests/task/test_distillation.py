"""Distillation: loss terms by hand, gradients, and runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from training.runs import metric_rows
from training.toys import TinyNet, fit, make_data, make_module

from bcos_train import create_model
from bcos_train.dataset import BcosEncoding, Standardize
from bcos_train.distillation import DistillationOptions, Teacher, distillation_loss
from bcos_train.explanation import explain
from bcos_train.loss import BinaryCrossEntropy
from bcos_train.task import Distillation, Network, TrainingBatch
from bcos_train.training.callbacks.distillation import DistillationCallback, distillation_metrics
from task.test_classification import batch


def teacher_of(model: nn.Module, encoding: Any = None) -> Teacher:
    return Teacher(model, "a teacher", encoding or BcosEncoding())


def task_of(student: nn.Module, teacher: Teacher | None = None, **options: Any) -> Distillation:
    torch.manual_seed(7)
    teacher = teacher or teacher_of(TinyNet())
    return Distillation(BinaryCrossEntropy(), teacher, DistillationOptions(teacher="toy", **options), student)


def standard() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["weights", "contributions"])
def test_the_loss_is_the_weighted_sum(kind: Any) -> None:
    student, images = TinyNet().eval(), batch()
    weights = {"ground_truth_weight": 0.5, "kd_weight": 2.0, "explanation_weight": 3.0}
    task = task_of(student, temperature=5, explanation=kind, **weights)
    output = task(Network(student), images)
    logits, teacher = student(images.x), task.teacher.model
    expected = teacher(images.x)
    predicted = expected.argmax(1)
    ours, theirs = (explain(model, images.x, predicted) for model in (student, teacher))
    pair = (ours.weights, theirs.weights) if kind == "weights" else (ours.contribution_map, theirs.contribution_map)
    similarity = F.cosine_similarity(pair[0].flatten(1), pair[1].flatten(1)).mean()
    ground_truth, kd = BinaryCrossEntropy()(logits, images.target), distillation_loss(logits, expected, 5)
    torch.testing.assert_close(output.loss, 0.5 * ground_truth + 2 * kd + 3 * (1 - similarity))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.logs["loss_kd"], kd.detach())
    torch.testing.assert_close(output.logs["loss_ground_truth"], ground_truth.detach())
    torch.testing.assert_close(output.logs["loss_explanation"], 1 - similarity)
    torch.testing.assert_close(output.logs["explanation_similarity"], similarity)
    torch.testing.assert_close(output.logs["agreement"], 100 * (logits.argmax(1) == predicted).float().mean())
    assert not any(value.requires_grad for value in output.logs.values())


def test_every_parameter_of_the_student_gets_a_gradient_and_none_of_the_teacher() -> None:
    student = TinyNet()
    task = task_of(student, explanation_weight=1.0, kd_weight=0.0)
    task(Network(student), batch()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in task.teacher.model.parameters())


def test_without_a_weight_nothing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    student, images = TinyNet(), batch()
    task, plain = task_of(student, explanation_weight=1.0, explanation_every_n_steps=3), task_of(student)
    monkeypatch.setattr(Teacher, "explain", lambda *_: 1 / 0)
    expected = plain(Network(student), images)
    for step in (1, 2, 4):
        output = task(Network(student), images._replace(step=step))
        torch.testing.assert_close(output.loss, expected.loss)
        assert "explanation_similarity" not in output.logs
    for step in (0, 3):
        with pytest.raises(ZeroDivisionError):
            task(Network(student), images._replace(step=step))


@pytest.mark.parametrize("is_student_standard", [True, False])
def test_pairs_of_different_encodings_compare_contributions(is_student_standard: bool) -> None:
    bcos, other, images = TinyNet(), standard(), batch()
    bcos.in_chans, other.in_chans = 6, 3  # type: ignore[assignment]
    encoding = Standardize()
    if is_student_standard:
        student, teacher = other, teacher_of(bcos)
        images = images._replace(x=encoding.encode(images.rgb))
    else:
        student, teacher = bcos, teacher_of(other, encoding)
    task = task_of(student, teacher, explanation_weight=1.0)
    assert task.explanation == "contributions"
    task(Network(student), images).loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.dim() > 1)
    with pytest.raises(ValueError, match="explanation=weights compares W"):
        task_of(student, teacher, explanation_weight=1.0, explanation="weights")


def test_a_run_keeps_the_teacher_out_of_everything(tmp_path: Path) -> None:
    data = make_data()
    torch.manual_seed(3)
    module = make_module(data)
    task = task_of(module.model, teacher_of(TinyNet()), explanation_weight=1.0)
    module.task = task
    before = {key: value.clone() for key, value in task.teacher.model.state_dict().items()}
    names = set(module.state_dict())
    fit(tmp_path, DistillationCallback(task, Console(quiet=True)), data=data, module=module)
    assert set(module.state_dict()) == names
    assert not any("teacher" in name for name, _ in module.named_modules())
    optimized = {id(p) for group in module.optimizers().param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert optimized == {id(p) for p in module.model.parameters()}
    assert not task.teacher.model.training
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.model.state_dict().items())
    rows = metric_rows(tmp_path)
    for name in distillation_metrics(task.options):
        values = [float(row[name]) for row in rows if row.get(name)]
        assert len(values) == 2, name
    model, teacher = module.model.eval(), task.teacher.model
    images, labels = data.val_samples(range(data.num_val))
    x = BcosEncoding()(images)
    expected = teacher(x).argmax(1)
    agreement = 100 * float((model(x).argmax(1) == expected).float().mean())
    similarity = F.cosine_similarity(*(explain(net, x, expected).weights.flatten(1) for net in (model, teacher))).mean()
    assert float(rows[-1]["val/agreement"]) == pytest.approx(agreement)
    assert float(rows[-1]["val/explanation_similarity"]) == pytest.approx(float(similarity), rel=1e-4)
    assert float(rows[-1]["val/kl"]) == pytest.approx(float(distillation_loss(model(x), teacher(x))), rel=1e-4)
    assert float(rows[-1]["val/teacher_acc1"]) == pytest.approx(100 * float((expected == labels).float().mean()))


def test_two_standard_networks_compare_grad_cam() -> None:
    student, teacher = (create_model("standard_resnet18", num_classes=4) for _ in range(2))
    rgb = torch.rand(2, 3, 64, 64)
    images = batch(2)._replace(rgb=rgb, x=Standardize().encode(rgb))
    task = task_of(student, teacher_of(teacher, Standardize()), explanation_weight=1.0, kd_weight=0.0)
    assert task.explanation == "grad_cam"
    output = task(Network(student.eval()), images)
    expected = teacher(images.x).argmax(1)
    maps = []
    for model in (student, teacher):
        features = images.x
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            features = getattr(model, name)(features)
        features = features if model is student else features.requires_grad_()
        (grad,) = torch.autograd.grad(model.fc(features.mean((2, 3))).gather(1, expected[:, None]).sum(), features)
        cam = (grad.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
        maps.append(F.interpolate(cam, (64, 64), mode="bilinear").flatten(1))
    torch.testing.assert_close(output.loss, 1 - F.cosine_similarity(*maps).mean(), rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert student.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="no layer 'final'"):
        task_of(TinyNet(), explanation="grad_cam")


def images_of(rank: int, size: int) -> TrainingBatch:
    rgb = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    indices = torch.arange(6)
    parts = (torch.cat([rgb, 1 - rgb], 1), indices % 4, rgb, indices)
    return TrainingBatch(*(part[rank::size] for part in parts))


def loss_of(rank: int, size: int, kind: str) -> tuple[nn.Module, nn.Module]:
    """Return the student, and the module that computes the loss: as Lightning does, DDP wraps what calls the task."""
    torch.manual_seed(0)
    student, teacher = TinyNet(norm="lnu-linear").double(), teacher_of(TinyNet().double())
    weights = {"ground_truth_weight": 0.5} if kind == "kd" else {"explanation_weight": 1.0}
    task = task_of(student, teacher, temperature=2, **weights)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.task = student, task

        def forward(self) -> torch.Tensor:
            return self.task(Network(self.student), images_of(rank, size)).loss

    return student, Loss()


@pytest.mark.parametrize("kind", ["kd", "e2kd"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    spawn(_differentiate_in_process, args=(2, str(tmp_path), kind), nprocs=2)
    student, loss = loss_of(0, 1, kind)
    loss().backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for ours, theirs in zip(gradients, student.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad)


def _differentiate_in_process(rank: int, size: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    student, loss = loss_of(rank, size, kind)
    wrapped = DistributedDataParallel(loss)  # kept until the backward pass, whose gradients it averages
    wrapped().backward()
    torch.save([parameter.grad for parameter in student.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()
