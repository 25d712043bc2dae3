"""What is compiled for a training step, how often, and when by default."""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.training import TrainerOptions, compilation
from bcos_train.training.compilation import (
    MIN_PARAMETERS_TO_COMPILE,
    CompiledNetwork,
    parts_to_compile,
    should_compile,
)


class Counter:
    """In place of torch's compiler: counts the graphs, and the calls of each."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number = len(self.calls)
        self.calls.append(0)

        def run(*args: Any) -> Any:
            self.calls[number] += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, original = Counter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=counter, **options))
    torch._dynamo.reset()
    return counter


def test_a_smaller_batch_neither_compiles_nor_replaces_a_graph(counter: Counter) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).double()
    network = CompiledNetwork(model, batch_size=8)
    for n in (8, 8, 3, 8, 3, 5, 8):
        x = torch.rand(n, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(network(x), model(x), rtol=1e-12, atol=1e-12)
    assert counter.calls == [4]


def test_a_run_that_resumes_with_its_smaller_batch(counter: Counter) -> None:
    network = CompiledNetwork(nn.Flatten(), batch_size=8)
    for n in (3, 8, 3, 9, 8):
        network(torch.rand(n, 2, 2))
    assert counter.calls == [2]


def test_equal_blocks_share_a_graph(counter: Counter) -> None:
    model = create_model("resnet20", num_classes=5, layers=(6, 6, 6), norm_layer="bnu-linear")
    keys = list(model.state_dict())
    network = CompiledNetwork(model, batch_size=2)
    assert str(network) == "block by block, 21 parts"
    # Stem, norm of the stem and classifier; of the blocks the first stage has one kind, the others two.
    for _ in range(2):
        network(torch.rand(2, 6, 8, 8)).sum().backward()
    assert len(counter.calls) == 3 + 5
    assert sum(counter.calls) == 2 * (3 + 18)
    assert list(model.state_dict()) == keys
    model.eval()
    model(torch.rand(2, 6, 8, 8))
    assert sum(counter.calls) == 2 * (3 + 18), "whoever calls the model itself doesn't run the compiled one"
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_an_exception_leaves_the_model_uncompiled(counter: Counter) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(RuntimeError):
        CompiledNetwork(model, batch_size=1)(torch.rand(1, 5))
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("resnet50", {}, 16),
        ("resnet101", {}, 33),
        ("convnext_tiny", {"stochastic_depth_prob": 0.0}, 18),
        ("simple_vit_ti_patch16_224", {}, 12),
        ("vitc_ti_patch1_14", {}, 11),
        pytest.param("densenet121", {}, None, id="densenet121: each layer has a width of its own"),
        pytest.param("vgg11_bnu", {}, None, id="vgg11_bnu: no blocks"),
        pytest.param("resnet50", {"stochastic_depth_prob": 0.1}, None, id="resnet50: each block has a probability"),
        pytest.param("plain_cnn9", {}, None, id="plain_cnn9: no blocks"),
    ],
)
def test_parts(name: str, options: dict[str, Any], blocks: int | None) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=5, **options)
    parts = parts_to_compile(model)
    if blocks is None:
        assert parts == [model]
        return
    inside = [part for part in parts if any(part in [*m] for m in model.modules() if isinstance(m, CheckpointedBlocks))]
    assert len(inside) == blocks
    # Each parameter in one part.
    expected = sorted(map(id, model.parameters()))
    assert sorted(id(p) for part in parts for p in part.parameters()) == expected
    model.set_grad_checkpointing()
    assert parts_to_compile(model) == [model]


class Network(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x


SMALL, LARGE = Network(MIN_PARAMETERS_TO_COMPILE - 1), Network(MIN_PARAMETERS_TO_COMPILE)


@pytest.mark.parametrize("missing", [None, "needs something"])
@pytest.mark.parametrize(
    ("cuda", "given", "model", "expected"),
    [
        (True, None, LARGE, True),
        (True, None, SMALL, False),
        (True, True, SMALL, True),
        (True, False, LARGE, False),
        (False, None, LARGE, False),
        (False, True, SMALL, True),
    ],
)
def test_default(
    cuda: bool,
    given: bool | None,
    model: nn.Module,
    expected: bool,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("bcos_train.utils.compiling.missing_for_compiling", lambda cuda=False: missing)
    monkeypatch.setattr(compilation, "missing_for_compiling", lambda cuda=False: missing)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    options = TrainerOptions(max_epochs=1, compile=given)
    if given and missing:
        with pytest.raises(ValueError, match=r"^trainer.compile=true needs something$"):
            should_compile(options, model)
    else:
        assert should_compile(options, model) == (expected and missing is None)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not should_compile(TrainerOptions(max_epochs=1), LARGE)
    with pytest.raises(ValueError, match=r"^trainer.compile=true needs Triton on CUDA, .*: pip install triton$"):
        should_compile(TrainerOptions(max_epochs=1, compile=True), SMALL)
