"""The task of model guidance: its loss by hand, which images it guides, and its sum over the parts of a batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from bcos_train import explain
from bcos_train.guidance import GuidanceOptions, energy_loss
from bcos_train.loss import BinaryCrossEntropy
from bcos_train.nn import BcosConv2d
from bcos_train.task import Guidance, Network, TrainingBatch

CLASSES, SIDE = 4, 8


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = BcosConv2d(6, 8, 3, padding=1), BcosConv2d(8, CLASSES, 3, padding=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def make_batch(n: int = 6, **changes: Any) -> TrainingBatch:
    """Image i has the class i % 4 and a box of it; every image has another box of class 3, the first one no box."""
    rgb = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    boxes = torch.tensor([[[i % CLASSES, i % 3, 1, 5, 6], [3, 0, 0, 2, 2]] for i in range(n)])
    boxes[0] = -1
    values = {
        "x": torch.cat([rgb, 1 - rgb], 1),
        "target": torch.arange(n) % CLASSES,
        "rgb": rgb,
        "indices": 10 * torch.arange(n),
        "extras": {"boxes": boxes},
    }
    return TrainingBatch(**{**values, **changes})


def make_task(annotated: Tensor | None = None, n_parts: int = 1, **changes: Any) -> Guidance:
    options = GuidanceOptions(**{"loss": "energy", "weight": 0.1, **changes})
    return Guidance(BinaryCrossEntropy(), options, annotated, n_parts)


def localization(output: Any, task: Guidance) -> Tensor:
    value: Tensor = (output.loss - output.logs["loss_classification"]) / task.options.weight
    return value


def test_the_loss_is_that_of_single_images() -> None:
    model, batch, task = make_model(), make_batch(), make_task()
    output = task(Network(model), batch)
    maps = explain(model.eval(), batch.x, batch.target).contribution_map
    masks = torch.zeros(6, SIDE, SIDE, dtype=torch.bool)
    for i in range(1, 6):
        masks[i, 1:6, i % 3 : 5] = True
        if i % CLASSES == 3:
            masks[i, :2, :2] = True
    expected = sum(float(energy_loss(maps[i : i + 1], masks[i : i + 1])) for i in range(1, 6))
    torch.testing.assert_close(output.logits, model(batch.x))
    loss = BinaryCrossEntropy()(output.logits, batch.target)
    assert output.loss.item() == pytest.approx(loss.item() + 0.1 * expected)
    assert {key: float(value) for key, value in output.logs.items()} == pytest.approx(
        {"loss_classification": loss.item(), "loss_localization": expected / 5}
    )
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("loss", ["energy", "l1", "ppce", "rrr"])
@pytest.mark.parametrize(("method", "layer"), [("bcos", "input"), ("bcos", "0"), ("ixg", "input"), ("grad_cam", "0")])
def test_every_parameter_gets_a_gradient(loss: str, method: str, layer: str) -> None:
    model, task = make_model(), make_task(loss=loss, method=method, layer=layer)
    localization(task(Network(model), make_batch()), task).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("loss", ["energy", "l1", "ppce", "rrr"])
def test_bfloat16(loss: str) -> None:
    model, batch, task = make_model().float(), make_batch(), make_task(loss=loss)
    batch = batch._replace(x=batch.x.float(), rgb=batch.rgb.float())
    exact = task(Network(model), batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = task(Network(model), batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_several_labels() -> None:
    """The explained class is a random positive one, the same in any batch, on any process."""
    model, task = make_model(), make_task()
    labels = torch.zeros(6, CLASSES, dtype=torch.float64)
    labels[1, [1, 3]] = 1
    labels[2, 2] = 1
    losses = set()
    for epoch in range(8):
        batch = make_batch(target=labels, epoch=epoch)
        values = [localization(task(Network(model), part_of(batch, part, 3)), task) for part in range(3)]
        total = localization(task(Network(model), batch), task)
        torch.testing.assert_close(sum(values), total)
        losses.add(round(total.item(), 9))
    first = [localization(task(Network(model), make_batch(2, target=torch.tensor([0, k]))), task) for k in (1, 3)]
    second = localization(task(Network(model), make_batch(3, target=torch.tensor([0, 0, 2]))), task)
    assert losses == {round((value + second).item(), 9) for value in first}


def test_images_without_annotation_are_left_out() -> None:
    model = make_model()
    annotated = torch.zeros(60, dtype=torch.bool)
    annotated[[10, 30]] = True
    some = make_task(annotated)
    batch = make_batch()
    single = [
        localization(some(Network(model), TrainingBatch(*(t[i : i + 1] for t in batch[:4]), boxes)), some)
        for i in range(6)
        for boxes in [{"boxes": batch.extras["boxes"][i : i + 1]}]  # type: ignore[index]
    ]
    assert [value.item() > 1e-6 for value in single] == [False, True, False, True, False, False]
    torch.testing.assert_close(localization(some(Network(model), batch), some), single[1] + single[3])
    assert "annotated" not in some.state_dict()


def test_a_batch_without_boxes_has_no_localization_loss() -> None:
    model, task = make_model(), make_task(loss="ppce")
    output = task(Network(model), make_batch(extras={"boxes": torch.full((6, 1, 5), -1)}))
    assert torch.equal(output.loss, output.logs["loss_classification"])
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_boxes_are_dilated() -> None:
    model = make_model()
    values = [
        localization(task(Network(model), make_batch()), task).item()
        for task in (make_task(), make_task(box_dilation=0.1), make_task(box_dilation=9))
    ]
    assert values[1] == values[0]  # less than a pixel
    assert values[2] < values[0]


def test_without_guidance_then_with() -> None:
    model, task = make_model(), make_task(start_epoch=2)
    for epoch, names in [(0, 1), (1, 1), (2, 2), (3, 2)]:
        output = task(Network(model), make_batch(epoch=epoch))
        assert len(output.logs) == names
        assert (output.loss > output.logs["loss_classification"]) == (names == 2)


def test_a_weight_of_zero_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcos_train.task.guidance.attribution_maps", None)
    model = make_model()
    output = make_task(weight=0)(Network(model), make_batch())
    assert torch.equal(output.loss, BinaryCrossEntropy()(model(make_batch().x), make_batch().target))


def test_the_sum_does_not_depend_on_the_parts_of_a_batch() -> None:
    model, batch = make_model(), make_batch()
    make_task()(Network(model), batch).loss.backward()
    expected, model = model, copy.deepcopy(model)
    model.zero_grad()
    task = make_task(n_parts=3)
    for part in range(3):
        (task(Network(model), part_of(batch, part, 3)).loss / 3).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def part_of(batch: TrainingBatch, part: int, n_parts: int) -> TrainingBatch:
    assert batch.extras is not None
    rows = slice(part, None, n_parts)
    extras = {"boxes": batch.extras["boxes"][rows]}  # type: ignore[index]
    return TrainingBatch(*(t[rows] for t in batch[:4]), extras, batch.epoch, batch.step)


def test_two_processes(tmp_path: Path) -> None:
    spawn(_train_in_process, args=(2, str(tmp_path)), nprocs=2)
    model = make_model()
    make_task()(Network(model), make_batch()).loss.backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for ours, theirs in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad)


class Step(nn.Module):
    """As Lightning does, DDP wraps the module that calls the task."""

    def __init__(self, model: nn.Module, task: Guidance) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: TrainingBatch) -> Tensor:
        return self.task(Network(self.model), batch).loss


def _train_in_process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    model = make_model()
    wrapped = DistributedDataParallel(Step(model, make_task(n_parts=2)))
    wrapped(part_of(make_batch(), rank, 2)).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()
