"""Losses on W(x): their gradient against finite differences and against two forward passes, in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from bcos_train import create_model, dynamic_linear_weights, explain
from bcos_train.explanation import explanation_graph, explanation_mode
from bcos_train.nn import (
    BcosConv2d,
    BcosLinear,
    Detachable,
    DetachableGELU,
    DetachableLayerNorm,
    DetachableReLU,
    make_norm,
    set_backend,
    sync_batch_norm_,
)
from bcos_train.nn.norm import NORM_NAMES

CLASSES = 5


def layers(*modules: nn.Module) -> nn.Sequential:
    """Put modules that keep (N, 8, H, W) between two convolutions and a linear layer."""
    stem, conv = BcosConv2d(6, 8, 3, padding=1), BcosConv2d(8, 8, 3, stride=2, padding=1, b=1.5)
    return nn.Sequential(stem, *modules, conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), BcosLinear(8, CLASSES))


class Tokens(nn.Module):
    """(N, C, H, W) -> (N, H W, C), normalized and activated, and back."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


RESNET: dict[str, Any] = {"inplanes": 4, "num_classes": CLASSES, "layers": (1, 1, 1)}
DENSE: dict[str, Any] = {"growth_rate": 4, "num_init_features": 8, "block_config": (2, 2), "num_classes": CLASSES}
NEXT: dict[str, Any] = {"layers": (1, 2), "channels": (8, 16), "num_classes": CLASSES, "stochastic_depth_prob": 0}
VIT: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "num_classes": CLASSES}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution": layers,
    "grouped": lambda: layers(BcosConv2d(8, 8, 3, groups=2, padding=2, dilation=2), BcosConv2d(8, 8, groups=8, b=3)),
    "maxout": lambda: layers(BcosConv2d(8, 8, 3, max_out=2), BcosConv2d(8, 8, b=2.5, max_out=3)),
    "learnable B": lambda: layers(BcosConv2d(8, 8, 3, b=nn.Parameter(torch.tensor(1.7)))),
    "bias": lambda: layers(BcosConv2d(8, 8, 3, bias=True, normalize_weight=False)),
    "linear": lambda: layers(Tokens(BcosLinear(8, 8, max_out=2), BcosLinear(8, 8, b=1.3))),
    "gates": lambda: layers(DetachableGELU(), DetachableReLU(), DetachableGELU(approximate="tanh")),
    "layer norm of tokens": lambda: layers(Tokens(DetachableLayerNorm(8))),
    **{f"norm {name}": partial(lambda name: layers(make_norm(name)(8), nn.MaxPool2d(2)), name) for name in NORM_NAMES},
    "resnet20": partial(create_model, "resnet20", **RESNET),
    "densenet": partial(create_model, "densenet52", **DENSE),
    "convnext": partial(create_model, "convnext_atto", **NEXT),
    "vit": partial(create_model, "simple_vit_ti_patch16_224", patch_size=4, **VIT),
    "vitc": partial(create_model, "vitc_ti_patch1_14", stem=(8, 16), **VIT),
    "standard vit": partial(create_model, "standard_simple_vit_ti_patch16_224", patch_size=4, **VIT),
    "standard": lambda: nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, CLASSES)
    ),
}


def build(name: str, is_training: bool = True) -> nn.Module:
    """Build a small network in float64 whose parameters and statistics are away from their initial values."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point() and tensor.dim() < 2:
            tensor.data += 0.2 * torch.randn_like(tensor)
    return model.train(is_training)


def images(model: nn.Module, n: int = 3) -> Tensor:
    size = 32 if hasattr(model, "transformer") or hasattr(model, "in_chans") else 8
    # With this seed, no unit crosses a kink within the steps of the finite differences.
    rgb = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return torch.cat([rgb, 1 - rgb], 1)[:, : getattr(model, "in_chans", 6)]


def loss_of(logits: Tensor, weights: Tensor) -> Tensor:
    """A loss on logits and explanations that is not symmetric in the images, channels or pixels."""
    wanted = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    similarity = F.cosine_similarity(weights.flatten(1), wanted.to(weights.dtype).flatten(1))
    scale = torch.arange(1, len(logits) + 1, dtype=weights.dtype)
    return (
        (scale * (1 - similarity)).sum()
        + 0.01 * weights.square().mean()
        + 0.1 * F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    )


def loss_and_gradient(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits, weights = dynamic_linear_weights(model, x, target, create_graph=True)
    loss = loss_of(logits, weights)
    return loss.detach(), gradient(loss, model)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
    return torch.cat([grad.flatten() for grad in filled])


def two_passes(model: nn.Module, x: Tensor, target: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Compute the same with a forward pass for the scales, and one from another leaf that multiplies by them."""
    scales: list[Tensor] = []
    everywhere = [module for module in model.modules() if isinstance(module, Detachable)]

    def record(module: Detachable, scale: Tensor) -> Tensor:
        scales.append(scale)
        return scale

    def replay(module: Detachable, scale: Tensor) -> Tensor:
        return scales.pop(0)

    with monkeypatch.context() as patched:
        for module in everywhere:
            module._detached_everywhere = True  # layers have other code for it
            patched.setattr(type(module), "check_explanation_mode", lambda self: None)
        patched.setattr(Detachable, "hold", record)
        logits = model(x)
        patched.setattr(Detachable, "hold", replay)
        leaf = x.clone().requires_grad_()
        with frozen_statistics(model):
            again = model(leaf)
        for module in everywhere:
            module._detached_everywhere = False
    assert not scales
    selected = again.gather(1, target[:, None]).sum()
    (weights,) = torch.autograd.grad(selected, leaf, create_graph=True)
    loss = loss_of(logits, weights)
    return loss.detach(), gradient(loss, model)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    kept = {module: dict(module._buffers) for module in model.modules()}
    for module, buffers in kept.items():
        module._buffers.update({key: buffer.clone() for key, buffer in buffers.items() if buffer is not None})
    yield
    for module, buffers in kept.items():
        module._buffers.update(buffers)


TARGET = torch.tensor([1, 4, 1])
BOTH_MODES = [
    (name, mode)
    for name in MODELS
    for mode in (True, False)
    if mode or "norm" in name or "net" in name or name == "standard"
]


@pytest.fixture(params=BOTH_MODES, ids=lambda case: f"{case[0]}, {'training' if case[1] else 'evaluation'}")
def case(request: pytest.FixtureRequest) -> nn.Module:
    return build(*request.param)


def test_the_gradient_is_that_of_two_passes(case: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(case)
    expected_loss, expected = two_passes(case, x, TARGET, monkeypatch)
    with frozen_statistics(case):
        loss, got = loss_and_gradient(case, x, TARGET)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-8)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
    assert float(F.cosine_similarity(got, expected, dim=0)) > 1 - 1e-12


def test_the_gradient_is_that_of_finite_differences(case: nn.Module) -> None:
    x, parameters = images(case), list(case.parameters())
    with frozen_statistics(case):
        _, grad = loss_and_gradient(case, x, TARGET)
    generator, typical = torch.Generator().manual_seed(3), float(grad.norm()) / len(grad) ** 0.5
    for _ in range(8):
        direction = F.normalize(torch.randn(len(grad), generator=generator, dtype=grad.dtype), dim=0)
        expected = float(grad @ direction)
        parts = direction.split([p.numel() for p in parameters])
        for h in (1e-6, 1e-7):  # larger steps cross the kinks of |cos|
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(case)
                with torch.no_grad():
                    for p, part in zip(moved.parameters(), parts, strict=True):
                        p += sign * h * part.view_as(p)
                logits, weights = dynamic_linear_weights(moved, x, TARGET, create_graph=True)
                values.append(float(loss_of(logits, weights).detach()))
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-4, abs=1e-3 * typical)


@pytest.mark.parametrize("name", [name for name in MODELS if "norm" not in name])
def test_the_values_are_those_of_looking_only(name: str) -> None:
    model = build(name, is_training=False)
    x = images(model)
    logits, weights = dynamic_linear_weights(model, x, TARGET, create_graph=True)
    expected = dynamic_linear_weights(model, x, TARGET)
    for ours, theirs in zip((logits, weights), expected, strict=True):
        assert ours.requires_grad
        assert not theirs.requires_grad
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits, model(x), rtol=1e-12, atol=1e-12)


def test_running_statistics_are_updated_once() -> None:
    model = build("resnet20")
    again, x = copy.deepcopy(model), images(model)
    dynamic_linear_weights(model, x, TARGET, create_graph=True)
    again(x)
    for (key, got), expected in zip(model.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=key)


@pytest.mark.parametrize("name", ["resnet20", "densenet", "convnext", "vit"])
def test_recomputed_blocks(name: str) -> None:
    """The block is recomputed in the inner backward pass, and after explanation mode in the outer one."""
    model = build(name)
    again, x = copy.deepcopy(model), images(model)
    again.set_grad_checkpointing()  # type: ignore[operator]
    expected_loss, expected = loss_and_gradient(model, x, TARGET)
    loss, got = loss_and_gradient(again, x, TARGET)
    assert torch.equal(loss, expected_loss)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(again.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulated_gradients_are_the_sum() -> None:
    model = build("resnet20", is_training=False)
    x = images(model)
    together = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for _ in range(2):
        together += loss_and_gradient(model, x, TARGET)[1]
    for _ in range(2):
        loss_of(*dynamic_linear_weights(model, x, TARGET, create_graph=True)).backward()
    accumulated = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(accumulated, together)


@pytest.mark.parametrize("backend", ["fused", "compiled", "reference"])
def test_every_backend(backend: Any) -> None:
    if backend == "compiled":
        pytest.importorskip("torch._inductor")
    model = build("resnet20")
    again, x = copy.deepcopy(model), images(model)
    set_backend(model, "reference")
    set_backend(again, backend)
    expected_loss, expected = loss_and_gradient(model, x, TARGET)
    loss, got = loss_and_gradient(again, x, TARGET)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_compiled_in_place() -> None:
    """Compiled code has no second derivatives; the explanation is computed without it."""
    model = build("convolution")
    again, x = copy.deepcopy(model), images(model)
    again.compile(backend="eager")
    expected = loss_and_gradient(model, x, TARGET)
    got = loss_and_gradient(again, x, TARGET)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["resnet20", "convnext", "vit"])
def test_bfloat16(name: str) -> None:
    model = build(name).float()
    x = images(model).float()
    _, expected = loss_and_gradient(model, x, TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights = dynamic_linear_weights(model, x, TARGET, create_graph=True)
        loss = loss_of(logits.float(), weights.float())
    got = gradient(loss, model)
    assert got.isfinite().all()
    assert float(F.cosine_similarity(got, expected, dim=0)) > 0.9


def test_a_plain_explanation_within_is_a_plain_one() -> None:
    model = build("convolution")
    x = images(model).requires_grad_()
    with explanation_graph(model) as gradient_of:
        logits = model(x)
        with explanation_mode(model):
            inner = model(x)
        again = model(x)
    (expected,) = torch.autograd.grad(inner.sum(), x)
    weights = gradient_of(logits.sum(), x)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(gradient_of(again.sum(), x), expected)
    (ordinary,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(logits.sum(), x)[0], ordinary)
    assert not torch.allclose(ordinary, expected)


def test_modules_of_other_packages_are_refused() -> None:
    bcos = pytest.importorskip("bcos.modules")
    model = nn.Sequential(bcos.BcosConv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"bcos\.modules\..*BcosConv2d has its own explanation mode"):
        dynamic_linear_weights(model, torch.rand(1, 6, 8, 8), 0, create_graph=True)
    with pytest.raises(ValueError, match="one process per GPU"):
        dynamic_linear_weights(nn.DataParallel(layers()), torch.rand(1, 6, 8, 8), 0, create_graph=True)
    explain(model.eval(), torch.rand(1, 6, 8, 8))


def test_two_processes(tmp_path: Path) -> None:
    """With DDP: the mean of the processes' gradients; synchronized norms see the whole batch."""
    spawn(_train_in_process, args=(2, str(tmp_path)), nprocs=2)
    for name in PARALLEL:
        results = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert torch.equal(results[0]["gradient"], results[1]["gradient"])
        model, x = _model_and_images(name)
        logits, weights = dynamic_linear_weights(model, x, FOUR_TARGETS, create_graph=True)
        loss = (loss_of(logits[:2], weights[:2]) + loss_of(logits[2:], weights[2:])) / 2
        torch.testing.assert_close(results[0]["gradient"], gradient(loss, model), rtol=1e-8, atol=1e-10)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(results[0][key], buffer)


PARALLEL = ("resnet20", "vit")
FOUR_TARGETS = torch.tensor([1, 4, 1, 0])


def _model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    model = build(name)
    return model, images(model, 4)


def _train_in_process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mine = slice(2 * rank, 2 * rank + 2)
    for name in PARALLEL:
        model, x = _model_and_images(name)
        wrapped = DistributedDataParallel(sync_batch_norm_(model))
        logits, weights = dynamic_linear_weights(wrapped, x[mine], FOUR_TARGETS[mine], create_graph=True)
        loss_of(logits, weights).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        result = {"gradient": torch.cat([grad.flatten() for grad in grads]), **dict(model.named_buffers())}
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()
