import copy
import pickle
from functools import partial

import pytest
import torch
from bcos.modules import norms as official_norms
from torch import Tensor, nn

import bcos_train.nn as ours
from bcos_train.nn import NORM_NAMES, BatchNorm2d, DetachableLayerNorm, NoBias, RunningNorm2d, Unaffine, make_norm

from .helpers import assert_near

OFFICIAL = {
    "an": official_norms.AllNorm2d,
    "bn": official_norms.BatchNorm2d,
    "gn": partial(official_norms.DetachableGroupNorm2d, 2),
    "in": official_norms.DetachableGNInstanceNorm2d,
    "ln": official_norms.DetachableGNLayerNorm2d,
    "pn": official_norms.DetachablePositionNorm2d,
    "anu": official_norms.AllNormUncentered2d,
    "bnu": official_norms.BatchNormUncentered2d,
    "gnu": partial(official_norms.GroupNormUncentered2d, 2),
    "inu": official_norms.GNInstanceNormUncentered2d,
    "lnu": official_norms.GNLayerNormUncentered2d,
    "pnu": official_norms.PositionNormUncentered2d,
}
WRAPPERS = {"": lambda make: make, "-linear": official_norms.NoBias, "-unaffine": official_norms.Unaffine}
VARIANTS = [name + suffix for name in NORM_NAMES for suffix in WRAPPERS]
UNCENTRED = [name for name in NORM_NAMES if name.endswith("u")]
RUNNING = ["an", "bn", "anu", "bnu"]
SHAPES = [(3, 6, 5, 7), (1, 6, 4, 4), (1, 4, 1, 3), (4, 8, 1, 1)]


MODES = ["train", "eval", "explanation", "explanation-train"]


def has_mode(variant: str, mode: str) -> bool:
    return kind(variant) not in ("an", "bn") or mode != "explanation-train"


def kind(variant: str) -> str:
    return variant.split("-")[0]


def randomize(norm: nn.Module, seed: int = 0) -> nn.Module:
    """Move affine parameters and running statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*norm.named_parameters(), *norm.named_buffers()):
            if value.dtype.is_floating_point:
                value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "mean" not in name else 0))
    return norm


def official_norm(variant: str, channels: int) -> nn.Module:
    suffix = variant.removeprefix(kind(variant))
    return randomize(WRAPPERS[suffix](OFFICIAL[kind(variant)])(channels))


def run(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    wanted = {"dx": x, **{f"d{name}": value for name, value in norm.named_parameters()}}
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(wanted.values()), cotangent)
    buffers = {name: value.detach().clone() for name, value in norm.named_buffers()}
    return {"output": out.detach(), **dict(zip(wanted, gradients, strict=True)), **buffers}


@pytest.mark.parametrize(
    ("variant", "shape", "mode"),
    [(v, s, m) for v in VARIANTS for s in (SHAPES[:1] if "-" in v else SHAPES) for m in MODES if has_mode(v, m)],
    ids=str,
)
def test_equals_official(variant, shape, mode):
    norms = randomize(make_norm(variant)(shape[1])), official_norm(variant, shape[1])
    assert list(norms[0].state_dict()) == list(norms[1].state_dict())
    for norm in norms:
        norm.train("train" in mode)
        norm.set_explanation_mode("explanation" in mode)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3 + 1
    mine, theirs = run(norms[0], x), run(norms[1], x)
    for what, reference in theirs.items():
        assert_near(mine[what], reference, 1e-5 if what == "output" else 1e-4, what)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None], ids=str)
@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics_follow_the_official_ones(name, momentum):
    mine, theirs = make_norm(name)(5, momentum=momentum), OFFICIAL[name](5, momentum=momentum)
    for step in range(4):
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(step)) * (step + 1) + step
        mine(x), theirs(x)
    for what, reference in theirs.state_dict().items():
        assert_near(mine.state_dict()[what], reference, 1e-5, what)
    mine.eval(), theirs.eval()
    assert_near(mine(x).detach(), theirs(x).detach(), 1e-5)
    mine.load_state_dict(official_norm(name, 5).state_dict())


@pytest.mark.parametrize("name", UNCENTRED)
def test_uncentered_divides_by_the_deviation_about_the_mean(name):
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64) + 10
    norm = make_norm(name)(6).double()
    expected = torch.empty_like(x)
    for n in range(3):
        for c in range(6):
            values = {
                "anu": x,
                "bnu": x[:, c],
                "gnu": x[n, c // 3 * 3 : c // 3 * 3 + 3],
                "inu": x[n, c],
                "lnu": x[n],
                "pnu": x[n],
            }[name]
            mean = values.mean(0) if name == "pnu" else values.mean()
            deviations = (values - mean).square()
            var = deviations.mean(0) if name == "pnu" else deviations.mean()
            expected[n, c] = x[n, c] / (var + 1e-5).sqrt()
    assert_near(norm(x).detach(), expected, 1e-12)


@pytest.mark.parametrize("variant", [name + suffix for name in NORM_NAMES for suffix in ("", "-linear")])
def test_gradient_in_explanation_mode_is_the_linear_map(variant):
    """The output is W(x) x plus the terms that don't depend on x (bias and running mean)."""
    norm = randomize(make_norm(variant)(6)).double().eval()
    norm.set_explanation_mode()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    out = norm(x)
    offset = torch.zeros(6, dtype=torch.float64) if norm.bias is None else norm.bias.detach().expand(6)
    if kind(variant) in ("an", "bn"):
        weight = norm.weight.detach()
        offset = offset - (norm.running_mean * weight / (norm.running_var + norm.eps).sqrt()).expand(6)
    for unit in range(0, out[0].numel(), 5):
        (linear_map,) = torch.autograd.grad(out.flatten(1)[:, unit].sum(), x, retain_graph=True)
        rebuilt = (linear_map * x).sum((1, 2, 3)) + offset[unit // 12]
        assert_near(rebuilt.detach(), out.flatten(1)[:, unit].detach(), 1e-10)


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in NORM_NAMES for m in MODES[2:] if has_mode(n, m)])
def test_explanation_mode_changes_no_output(name, mode):
    norm = randomize(make_norm(name)(6)).double().train(mode == "explanation-train")
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    expected = copy.deepcopy(norm)(x)
    norm.set_explanation_mode()
    assert norm.is_in_explanation_mode
    assert_near(norm(x).detach(), expected.detach(), 1e-12)
    norm.set_explanation_mode(False)
    assert not norm.is_in_explanation_mode


@pytest.mark.parametrize("name", NORM_NAMES)
def test_gradcheck_twice(name):
    norm = randomize(make_norm(name)(4)).double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*norm.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("name", ["an", "bn"])
def test_centered_batch_statistics_cannot_be_explained(name):
    norm = make_norm(name)(4)
    x = torch.rand(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="eval"):
        norm.set_explanation_mode()
    assert not norm.is_in_explanation_mode
    norm.eval()
    norm.set_explanation_mode()
    norm(x)
    norm.train()
    with pytest.raises(RuntimeError, match="eval"):
        norm(x)
    assert norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="track_running_stats"):
        make_norm(name)(4, track_running_stats=False).eval().set_explanation_mode()


@pytest.mark.parametrize("name", RUNNING)
def test_without_running_statistics(name):
    mine, theirs = (make(4, track_running_stats=False).eval() for make in (make_norm(name), OFFICIAL[name]))
    assert list(mine.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 4, 3, 3) + 1
    assert_near(mine(x).detach(), theirs(x).detach(), 1e-5)


@pytest.mark.parametrize(("name", "shape"), [("bn", (1, 4, 1, 1)), ("an", (1, 1, 1, 1))])
def test_one_value_cannot_be_centered(name, shape):
    with pytest.raises(ValueError, match="more than"):
        make_norm(name)(shape[1])(torch.rand(shape))


@pytest.mark.parametrize("name", NORM_NAMES)
@pytest.mark.parametrize("shape", [(4, 5, 5), (2, 6, 5, 5), (2, 1, 5, 5)], ids=str)
def test_wrong_input(name, shape):
    with pytest.raises(ValueError, match="shape"):
        make_norm(name)(4)(torch.rand(shape))


def test_wrong_groups():
    with pytest.raises(ValueError, match="num_groups=4"):
        ours.DetachableGroupNorm2d(4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize("name", NORM_NAMES)
def test_autocast_keeps_the_statistics_in_float32(name, explain, dtype):
    """In float16 the variance of values about ±300 overflows, and eps = 1e-5 is almost lost."""
    torch.manual_seed(0)  # channels of equal sign have so little variance that a true gradient may exceed float16
    norm = make_norm(name)(4)
    if explain:
        norm = norm.eval() if name in ("an", "bn") else norm
        norm.set_explanation_mode()
    x = torch.randn(2, 4, 4, 4).sign() * 300 + torch.randn(2, 4, 4, 4)
    x[0] = 0
    x = x.to(dtype).float()
    reference = copy.deepcopy(norm)(x)
    half = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = norm(half)
    (gradient,) = torch.autograd.grad(out.float().square().mean(), half)
    assert torch.isfinite(gradient).all()
    assert_near(out.detach(), reference.detach(), 2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NORM_NAMES)
def test_zero_image_is_finite(name, training):
    norm = make_norm(name)(4).train(training)
    x = torch.zeros(2, 4, 3, 3)
    assert all(torch.isfinite(value).all() for value in run(norm, x).values())
    assert (norm(x) == 0).all()


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explanation"])
@pytest.mark.parametrize("variant", [name + suffix for name in NORM_NAMES for suffix in ("", "-linear")])
def test_keeps_channels_last(variant, explain):
    norm = make_norm(variant)(4).train(not explain)
    norm.set_explanation_mode(explain)
    x = torch.randn(2, 4, 3, 5)
    plain, last = norm(x), norm(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_near(last.detach(), plain.detach(), 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles(variant):
    norm = randomize(make_norm(variant)(4)).eval()
    norm.set_explanation_mode()
    x = torch.rand(2, 4, 3, 3)
    before = x.clone()
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.is_in_explanation_mode
        assert torch.equal(other(x), norm(x))
    assert torch.equal(x, before)
    make = pickle.loads(pickle.dumps(make_norm(variant)))
    assert list(make(4).state_dict()) == list(norm.state_dict())


class AllSideBySide(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([make_norm(name)(channels) for name in NORM_NAMES])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(x) for norm in self.norms])


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    for training in (True, False):
        net = AllSideBySide(4).train(training)
        x = torch.rand(2, 4, 3, 3)
        expected = run(copy.deepcopy(net), x)
        compiled = run(torch.compile(net, backend="aot_eager", fullgraph=True), x)
        for what, mine in compiled.items():
            assert_near(mine, expected[what.replace("_orig_mod.", "")], 1e-4, what)


@pytest.mark.parametrize("name", RUNNING)
def test_torch_cannot_turn_it_into_a_centered_sync_batch_norm(name):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(make_norm(name)(4)))
    assert isinstance(net[0], RunningNorm2d)
    assert not isinstance(net[0], nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("mode", ["train", "explanation"])
@pytest.mark.parametrize(
    ("normalized_shape", "kwargs"),
    [(6, {}), ((4, 6), {}), (6, {"elementwise_affine": False}), (6, {"bias": False})],
    ids=str,
)
def test_layer_norm_of_tokens_equals_official(normalized_shape, kwargs, mode):
    norms = (
        DetachableLayerNorm(normalized_shape, **kwargs),
        official_norms.DetachableLayerNorm(normalized_shape, **kwargs),
    )
    for norm in norms:
        randomize(norm).set_explanation_mode(mode == "explanation")
    assert list(norms[0].state_dict()) == list(norms[1].state_dict())
    mine, theirs = (run(norm, torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))) for norm in norms)
    for what, reference in theirs.items():
        assert_near(mine[what], reference, 1e-5 if what == "output" else 1e-4, what)


def test_layer_norm_of_tokens_without_bias():
    norm = NoBias(DetachableLayerNorm)(6, eps=1e-6).double()
    norm.set_explanation_mode()
    assert norm.bias is None
    assert norm.eps == 1e-6
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = norm(x)
    for unit in range(6):
        (linear_map,) = torch.autograd.grad(out[:, unit].sum(), x, retain_graph=True)
        assert_near((linear_map * x).sum(1).detach(), out[:, unit].detach(), 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names(variant):
    norm, reference = make_norm(variant)(8), official_norm(variant, 8)
    assert type(norm).__name__ == type(reference).__name__
    assert (norm.weight is None, norm.bias is None) == (reference.weight is None, reference.bias is None)
    assert getattr(norm, "num_groups", None) == getattr(reference, "num_groups", None)


def test_none_is_the_identity():
    assert isinstance(make_norm("none")(8), nn.Identity)


@pytest.mark.parametrize(
    ("wrong", "right"), [("bnu-liner", "bnu-linear"), ("BNU", "bnu"), ("pn_linear", "pn-linear"), ("non", "none")]
)
def test_unknown_name(wrong, right):
    with pytest.raises(ValueError, match=f"did you mean {right}"):
        make_norm(wrong)


@pytest.mark.parametrize("wrapper", [NoBias, Unaffine])
def test_nothing_to_remove(wrapper):
    with pytest.raises(ValueError, match="affine=False"):
        wrapper(BatchNorm2d)(4, affine=False)


def test_wrapper_forwards_arguments():
    assert NoBias(BatchNorm2d)(4, momentum=0.3).momentum == 0.3
    with pytest.raises(TypeError, match="momentun"):
        NoBias(BatchNorm2d)(4, momentun=0.3)
