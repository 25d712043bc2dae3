"""Threads that share a model: explanations, ordinary passes and hooks of one don't reach another."""

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.explanation import constant_term, explanation_mode, without_tf32
from bcos_train.nn import BatchNormUncentered2d, BcosConv2d, Detachable


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        BcosConv2d(6, 8, 3), BatchNormUncentered2d(8), BcosConv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def is_on(model: nn.Module) -> list[bool]:
    return [module.detach for module in model.modules() if isinstance(module, Detachable)]


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    return gradient


class Other:
    """A second thread, which does one thing at a time."""

    def __enter__(self) -> "Other":
        self.pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(function, *args).result(timeout=60)


def test_explanations_in_a_pool_of_threads_equal_those_of_one() -> None:
    model = create_model("resnet20", num_classes=10).eval()
    images = torch.rand(240, 6, 8, 8)
    expected = [explain(model, x[None]).weights for x in images[:8]]
    with ThreadPoolExecutor(4) as pool:
        weights = list(pool.map(lambda i: explain(model, images[i % 8][None]).weights, range(240)))
    for i, w in enumerate(weights):
        torch.testing.assert_close(w, expected[i % 8])
    assert not any(is_on(model))


def test_threads_that_enter_and_leave_in_turn() -> None:
    model, x = small_model(), torch.rand(2, 6, 7, 7)
    ordinary = input_gradient(model, x)
    with explanation_mode(model):
        linear = input_gradient(model, x)
    assert not torch.allclose(ordinary, linear)
    here, there = explanation_mode(model), explanation_mode(model)
    with Other() as other:
        here.__enter__()
        torch.testing.assert_close(other(input_gradient, model, x), ordinary)
        other(there.__enter__)
        here.__exit__(None, None, None)
        torch.testing.assert_close(input_gradient(model, x), ordinary)
        torch.testing.assert_close(other(input_gradient, model, x), linear)
        other(there.__exit__, None, None, None)
        torch.testing.assert_close(other(input_gradient, model, x), ordinary)
    assert not any(is_on(model))


def test_one_instance_in_two_threads() -> None:
    model = small_model()
    mode = explanation_mode(model)
    with Other() as other:
        mode.__enter__()
        other(mode.__enter__)
        mode.__exit__(None, None, None)
        assert not any(is_on(model))
        assert all(other(is_on, model))
        other(mode.__exit__, None, None, None)
        assert not any(other(is_on, model))


def test_a_backward_pass_of_another_thread_during_an_explanation() -> None:
    """The mode counts in the forward pass, so it matters neither when nor where the backward pass runs."""
    model, x = small_model(), torch.rand(2, 6, 7, 7)
    leaf = x.clone().requires_grad_()
    output = model(leaf)[:, 0].sum()
    expected = input_gradient(model, x)
    with Other() as other, explanation_mode(model):
        (here,) = torch.autograd.grad(output, leaf, retain_graph=True)
        (there,) = other(lambda: torch.autograd.grad(output, leaf))
    torch.testing.assert_close(here, expected)
    torch.testing.assert_close(there, expected)


def test_training_beside_explanations() -> None:
    def train(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model, x = small_model(), torch.rand(2, 6, 7, 7)
    expected = train(copy.deepcopy(model))
    stop = threading.Event()

    def keep_explaining() -> None:
        while not stop.is_set():
            explain(model, x)

    with ThreadPoolExecutor(1) as pool:
        explaining = pool.submit(keep_explaining)
        try:
            for _ in range(50):
                for ours, reference in zip(train(model), expected, strict=True):
                    torch.testing.assert_close(ours, reference)
        finally:
            stop.set()
        explaining.result(timeout=60)


def test_asyncio_tasks() -> None:
    model = small_model()

    async def explaining(entered: asyncio.Event, leave: asyncio.Event) -> list[bool]:
        with explanation_mode(model):
            entered.set()
            await leave.wait()
            return is_on(model)

    async def main() -> tuple[list[bool], list[bool]]:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(explaining(entered, leave))
        await entered.wait()
        seen = is_on(model)
        leave.set()
        return seen, await task

    outside, inside = asyncio.run(main())
    assert not any(outside)
    assert all(inside)


def test_one_instance_in_two_tasks() -> None:
    model = small_model()
    mode = explanation_mode(model)

    async def explaining(own: asyncio.Event, other: asyncio.Event) -> list[bool]:
        with mode:
            own.set()
            await other.wait()
            return is_on(model)

    async def main() -> list[list[bool]]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(explaining(first, second), explaining(second, first))

    assert all(map(all, asyncio.run(main())))
    assert not any(is_on(model))


def test_leaving_in_another_thread_is_an_error() -> None:
    mode = explanation_mode(small_model())
    mode.__enter__()
    with Other() as other, pytest.raises(RuntimeError, match="another thread or task"):
        other(mode.__exit__, None, None, None)
    mode.__exit__(None, None, None)


class ThirdParty(nn.Module):
    """As the modules of the official code: the mode is a flag of the module."""

    detach = False

    def set_explanation_mode(self, activate: bool = True) -> None:
        self.detach = activate

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs()
        return x * (scale.detach() if self.detach else scale)


@pytest.mark.parametrize("before", [False, True])
def test_a_third_party_module_is_on_until_the_last_thread_leaves(before: bool) -> None:
    model = nn.Sequential(BcosConv2d(6, 3), ThirdParty())
    model[1].set_explanation_mode(before)
    here, there = explanation_mode(model), explanation_mode(model)
    with Other() as other:
        here.__enter__()
        other(there.__enter__)
        here.__exit__(None, None, None)
        assert model[1].detach
        other(there.__exit__, None, None, None)
    assert model[1].detach is before
    assert not model[0].detach


def test_a_copy_made_in_explanation_mode_is_not_in_it() -> None:
    model = small_model()
    with explanation_mode(model):
        clone = copy.deepcopy(model)
        assert not any(is_on(clone))
    assert not any(is_on(clone))


def test_replicas_of_data_parallel_run_in_threads_of_their_own() -> None:
    model, x = small_model(), torch.rand(2, 6, 7, 7)
    with explanation_mode(model), Other() as other:
        expected = input_gradient(model, x)
        replica = model[0]._replicate_for_data_parallel()
        assert other(lambda: replica.detach)
        torch.testing.assert_close(input_gradient(model, x), expected)
    assert not model[0]._replicate_for_data_parallel().detach


def test_compiled_code_follows_the_mode() -> None:
    model, x = small_model(), torch.rand(2, 6, 7, 7)
    compiled = torch.compile(lambda x: model(x), backend="aot_eager")
    ordinary = input_gradient(compiled, x)
    with explanation_mode(model):
        expected = input_gradient(model, x)
        torch.testing.assert_close(input_gradient(compiled, x), expected)
        with Other() as other:
            torch.testing.assert_close(other(input_gradient, compiled, x), ordinary)
    assert not torch.allclose(ordinary, expected)
    torch.testing.assert_close(input_gradient(compiled, x), ordinary)


def test_constant_term_ignores_the_passes_of_other_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(2, 6, 7, 7)
    expected = constant_term(model, x)

    class Interrupting(nn.Module):
        """While it is computed, another thread uses the model."""

        def forward(self, x: Tensor) -> Tensor:
            if not busy:
                busy.append(True)
                other(model[0], torch.rand(2, 6, 7, 7))
            return x

    busy: list[bool] = []
    with Other() as other:
        result = constant_term(nn.Sequential(model[0], Interrupting(), *model[1:]).eval(), x)
    assert busy
    torch.testing.assert_close(result, expected)


def test_full_precision_lasts_until_the_last_thread_leaves() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        here, there = without_tf32(), without_tf32()
        with Other() as other:
            here.__enter__()
            other(there.__enter__)
            here.__exit__(None, None, None)
            assert matmul.fp32_precision == "ieee"
            other(there.__exit__, None, None, None)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
