"""The sum of a residual block: always that of `+`, and in place only where nobody notices."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from bcos_train.nn import BatchNormUncentered2d, BcosConv2d, add_shortcut, cached_weights, make_norm, set_backend
from bcos_train.nn.fast.dispatch import is_folded


class Branch(nn.Module):
    def __init__(self, norm: str, stochastic_depth: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = BcosConv2d(4, 4, 3, padding=1)
        self.norm = make_norm(norm)(4)
        self.modules_in_order: list[nn.Module] = [self.conv, self.norm]
        if stochastic_depth:
            self.modules_in_order.append(StochasticDepth(0.5, "row"))
        self.double()

    def chains(self):
        yield self.modules_in_order

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules_in_order:
            x = module(x)
        return x


def image() -> Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", ["none", "bnu-linear", "bn", "pn", "anu"])
@pytest.mark.parametrize("stochastic_depth", [False, True], ids=["", "stochastic depth"])
def test_gradients_are_those_of_the_sum(norm, training, stochastic_depth):
    branch = Branch(norm, stochastic_depth).train(training)
    results = []
    for add in (lambda a, b, *_: a + b, add_shortcut):
        torch.manual_seed(2)
        x = image().requires_grad_()
        out = add(branch(x), x, *branch.modules_in_order)
        grads = torch.autograd.grad(out.pow(3).sum(), (x, branch.conv.linear.weight))
        results.append((out.detach(), *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "bnu-linear"])
@torch.no_grad()
def test_in_place_without_gradients(norm):
    branch, x = Branch(norm).eval(), image()
    out = branch(x)
    expected = out + x
    total = add_shortcut(out, x, *branch.modules_in_order)
    assert total is out
    assert torch.equal(total, expected)


def test_in_place_after_a_norm_in_training():
    branch, x = Branch("bnu-linear"), image().requires_grad_()
    out = branch(x)
    assert add_shortcut(out, x, *branch.modules_in_order) is out


@pytest.mark.parametrize("explained", [(), ("conv",), ("norm",), ("conv", "norm")], ids=str)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_folded_norms(backend, explained):
    branch, x = Branch("bnu-linear").eval(), image().requires_grad_()
    set_backend(branch, backend)
    for name in explained:
        branch.get_submodule(name).set_explanation_mode()
    (expected,) = torch.autograd.grad((branch(x) + x).sum(), x)
    with cached_weights(branch):
        assert isinstance(branch.norm, BatchNormUncentered2d)
        assert is_folded(branch.norm) == (backend == "fused")
        out = branch(x)
        total = add_shortcut(out, x, *branch.modules_in_order)
        assert (total is out) == (backend == "reference" or explained == ("conv", "norm"))
        (found,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["conv", "conv.linear", "norm"])
@torch.no_grad()
def test_what_a_hook_has_taken_stays(place):
    branch, x, taken = Branch("none").eval(), image(), []
    branch.get_submodule(place).register_forward_hook(lambda module, inputs, out: taken.append(out))
    out = branch(x)
    before = taken[0].clone()
    add_shortcut(out, x, *branch.modules_in_order)
    assert torch.equal(taken[0], before)


@pytest.mark.parametrize("norm", ["none", "bnu-linear"])
def test_global_hooks(norm):
    """Those for the modules of all networks; one of the backward pass forbids changes in place."""
    branch, x, taken = Branch(norm).eval(), image().requires_grad_(), []
    everywhere = torch.nn.modules.module
    handles = [
        everywhere.register_module_forward_hook(lambda module, inputs, out: taken.append((out, out.detach().clone()))),
        everywhere.register_module_full_backward_hook(lambda *_: None),
    ]
    try:
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                add_shortcut(branch(x), x, *branch.modules_in_order)
    finally:
        for handle in handles:
            handle.remove()
    assert taken
    for out, before in taken:
        assert torch.equal(out, before)


class Remembering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.given = x * 2
        return self.given


@torch.no_grad()
def test_what_a_module_remembers_stays():
    branch, x = Branch("none").eval(), image()
    branch.modules_in_order.append(remembering := Remembering())
    add_shortcut(out := branch(x), x, *branch.modules_in_order)
    assert remembering.given is out
    assert torch.equal(out, 2 * branch.conv(x))


@torch.no_grad()
def test_what_a_replaced_forward_remembers_stays():
    branch, x, taken = Branch("bnu-linear").eval(), image(), []
    original = branch.norm.forward
    branch.norm.forward = lambda x: taken.append(original(x)) or taken[-1]  # type: ignore[method-assign, func-returns-value]
    before = branch(x).clone()
    add_shortcut(branch(x), x, *branch.modules_in_order)
    assert torch.equal(taken[-1], before)


@torch.no_grad()
def test_what_is_handed_on_stays():
    x = image()
    before = x.clone()
    assert torch.equal(add_shortcut(x, x, nn.Identity(), nn.Identity()), 2 * before)
    assert torch.equal(x, before)


class Bounded(BatchNormUncentered2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


def test_norms_of_other_making():
    x, norm = image().requires_grad_(), Bounded(4).double()
    (found,) = torch.autograd.grad(add_shortcut(norm(x), x, norm).sum(), x)
    (expected,) = torch.autograd.grad((norm(x) + x).sum(), x)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_of_two_dtypes_the_wider():
    branch, x = Branch("none"), image()
    out = branch(x).float()
    assert add_shortcut(out, x, *branch.modules_in_order).dtype == torch.float64
