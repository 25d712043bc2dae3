"""Two processes against one process with the concatenated batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bcos_train.nn import BcosConv2d, RunningNorm2d, make_norm, sync_batch_norm_

from .helpers import assert_near

NAMES = ["an", "bn", "anu", "bnu", "bnu-linear"]
SPLITS = {"even": (4, 4), "uneven": (1, 7), "empty": (8, 0)}
CASES = [
    (name, split, explain)
    for name in NAMES
    for split in SPLITS
    for explain in (False, True)
    if not explain or "u" in name
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # A mean far from 0 that changes from sample to sample, so that no process has the statistics of the whole.
    x = torch.randn(8, 4, 3, 5, dtype=torch.float64, generator=generator) + torch.arange(8.0).view(-1, 1, 1, 1) * 3
    return x, torch.randn(x.shape, dtype=torch.float64, generator=generator)


def build(name: str, explain: bool) -> nn.Module:
    norm = make_norm(name)(4).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    norm.set_explanation_mode(explain)
    return norm


def two_steps(norm: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    norm(2 * x.detach())
    out = norm(x)
    parameters = dict(norm.named_parameters())
    dx, *gradients = torch.autograd.grad((out * cotangent).sum(), [x, *parameters.values()], create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x, allow_unused=True)
    second = torch.zeros_like(x) if second is None else second
    local = {"output": out, "dx": dx, "second": second, **norm.state_dict()}
    result = {key: value.detach().clone() for key, value in local.items()}
    return result | {f"d{key}": value.detach() for key, value in zip(parameters, gradients, strict=True)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, cotangent = batch()
    results = {}
    for name, split, explain in CASES:
        first = SPLITS[split][0]
        part = slice(0, first) if rank == 0 else slice(first, None)
        norm = sync_batch_norm_(build(name, explain))
        results[name, split, explain] = two_steps(norm, x[part], cotangent[part])
    # Half precision, and eval mode, which must not communicate: only one process calls it.
    norm = sync_batch_norm_(make_norm("bnu")(4))
    half = norm((x[:4] if rank == 0 else x[4:]).half())
    results["half"] = half
    if rank == 0:
        norm.eval()(x.float())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("sync")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0], case[1], "explanation" if case[2] else "plain"])
)
def test_two_processes_equal_one(results, case):
    name, _, explain = case
    expected = two_steps(build(name, explain), *batch())
    of_rank = [result[case] for result in results]
    for what, reference in expected.items():
        if what in ("output", "dx", "second"):
            assert_near(torch.cat([result[what] for result in of_rank]), reference, 1e-10, what)
        elif what in ("dweight", "dbias"):
            assert_near(of_rank[0][what] + of_rank[1][what], reference, 1e-10, what)
        else:
            for result in of_rank:
                assert_near(result[what], reference, 1e-10, what)


def test_without_synchronization_the_processes_differ():
    """The premise of the test above."""
    x, cotangent = batch()
    whole, half = (two_steps(build("bnu", False), x[:n], cotangent[:n])["output"][:4] for n in (8, 4))
    assert (whole[:4] - half).abs().max() > 0.1


def test_half_precision(results):
    out = torch.cat([result["half"] for result in results])
    assert out.dtype == torch.float16
    assert_near(out, make_norm("bnu")(4)(batch()[0].float()).detach(), 2e-3)


def test_one_process_is_unchanged():
    model = nn.Sequential(BcosConv2d(4, 4), make_norm("bnu")(4), nn.Sequential(make_norm("an")(4)), make_norm("lnu")(4))
    x = torch.rand(2, 4, 3, 3)
    expected = model(x)
    assert sync_batch_norm_(model) is model
    assert [module.synchronized for module in model.modules() if isinstance(module, RunningNorm2d)] == [True, True]
    assert torch.equal(model(x), expected)
