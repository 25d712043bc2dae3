"""Contract of all explanation methods: names, shapes, side effects, errors."""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from method_models import NAMES, assert_same, make_input, make_model
from torch import Tensor, nn

from bcos_train.explanation.method import METHODS, CannotExplain, Method, list_methods, make_method
from bcos_train.explanation.method.base import token_grid

#: Options with which a method is quick.
QUICK: dict[str, dict[str, Any]] = {
    "int_grad": {"n_steps": 3},
    "smooth_grad": {"n_samples": 3},
    "lime": {"n_samples": 12, "kernel_size": 2},
    "rise": {"n_masks": 12, "p": 0.5},
    **{f"occlusion{kernel}": {"stride": 8} for kernel in (5, 9, 13)},
}
#: What can't be.
IMPOSSIBLE = {
    **{(method, name): "has no B-cos layers" for method in ("bcos", "bcos_relative") for name in NAMES[2:]},
    **{("guided_backprop", name): "has no nn.ReLU" for name in NAMES[:2]},
    **{("deep_lift", name): "no layer for which captum's DeepLIFT has a rule" for name in NAMES[:2]},
    **{("attention_rollout", name): "no self-attention" for name in NAMES if name != "bcos_vit"},
}
PAIRS = [(method, name) for method in METHODS for name in NAMES]
POSSIBLE = [pair for pair in PAIRS if pair not in IMPOSSIBLE]


def quick(name: str) -> Method:
    return make_method(name, **QUICK.get(name, {}))


def state(model: nn.Module) -> list[Any]:
    """Snapshot of a model: names, modes, attributes, hooks, parameters and buffers."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        # `detach` is an attribute of the class until explanation mode is first left.
        simple = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        simple["detach"] = getattr(module, "detach", None) is True
        seen.append((name, id(module), simple, sorted(vars(module).keys() - {"detach"})))
        seen.append({key: len(value) for key, value in vars(module).items() if key.endswith("hooks")})
        seen.append(list(module._modules))
    seen += [(name, id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()]
    return seen + [(name, id(b), b._version) for name, b in model.named_buffers()]


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


@pytest.mark.parametrize(("method", "name"), POSSIBLE)
def test_no_side_effects(method: str, name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    x.requires_grad_()
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()
    before = state(model), random_states(), x.detach().clone(), targets.clone(), torch.is_grad_enabled()
    maps = quick(method)(model, x, targets)
    assert (state(model), random_states()) == before[:2]
    assert torch.equal(x, before[2])
    assert torch.equal(targets, before[3])
    assert (x.requires_grad, x.grad, torch.is_grad_enabled()) == (True, None, True)
    assert maps.shape == (2, 3, 16, 24)
    assert maps.dtype == torch.float64
    assert not maps.requires_grad
    assert maps.isfinite().all()
    assert maps.any()
    next(model.parameters()).requires_grad_(True)
    model.train()


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize(("method", "name"), POSSIBLE)
def test_no_side_effects_after_an_exception(method: str, name: str) -> None:
    """The model fails at its last layer; for DeepLIFT after captum has set its hooks."""
    model, inputs = make_model(name), make_input(name)
    last = [module for module in model.modules() if not list(module.children())][-1]

    calls: list[None] = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == (2 if method == "deep_lift" else 1):
            raise Broken

    handle = last.register_forward_hook(fail)
    before = state(model), random_states()
    try:
        with pytest.raises(Broken):
            quick(method)(model, *inputs)
        assert (state(model), random_states()) == before
    finally:
        handle.remove()


@pytest.mark.parametrize(("method", "name"), POSSIBLE)
def test_same_within_no_grad_and_inference_mode(method: str, name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    expected = quick(method)(model, x, targets)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(quick(method)(model, x.clone(), targets.clone()), expected)


@pytest.mark.parametrize(("method", "name"), POSSIBLE)
def test_images_and_targets_are_independent(method: str, name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    expected = quick(method)(model, x, targets)
    alone = [
        torch.cat([quick(method)(model, x[n : n + 1], targets[n : n + 1, t, None]) for t in range(3)], 1)
        for n in range(2)
    ]
    assert_same(torch.cat(alone), expected)


@pytest.mark.parametrize(("method", "name"), POSSIBLE)
def test_float32(method: str, name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    expected = quick(method)(model, x, targets)
    try:
        maps = quick(method)(model.float(), x.float(), targets)
    finally:
        model.double()
    assert maps.dtype == torch.float32
    if method != "lime":  # where the order of two segments may turn
        assert_same(maps.double(), expected, 0.02)


@pytest.mark.parametrize(("method", "name"), [pair for pair in POSSIBLE if pair[1] == "small_conv_net"])
def test_no_tensor_on_torch_default_device(method: str, name: str) -> None:
    """Tensors are created on the device of the input or explicitly on the CPU."""
    model, (x, targets) = make_model(name), make_input(name)
    expected = quick(method)(model, x, targets)
    with torch.device("meta"):
        assert torch.equal(quick(method)(model, x, targets), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("method", "name"), {method: (method, name) for method, name in POSSIBLE}.values())
def test_gpu(method: str, name: str) -> None:
    model, (x, targets) = make_model(name), make_input(name)
    expected = quick(method)(model, x, targets)
    before = torch.cuda.get_rng_state()
    try:
        maps = quick(method)(model.cuda(), x.cuda(), targets)
    finally:
        model.cpu()
    assert maps.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert_same(maps.cpu(), expected, 1e-6)


@pytest.mark.parametrize(("method", "name"), IMPOSSIBLE)
def test_error_names_the_reason(method: str, name: str) -> None:
    model = make_model(name)
    before = state(model)
    with pytest.raises(CannotExplain, match=IMPOSSIBLE[method, name]) as error:
        quick(method)(model, *make_input(name))
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)
    assert state(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        (
            (3, 16, 24),
            torch.zeros(1, 1, dtype=torch.long),
            r"x must be .*\(N, C, H, W\).* got torch.float64 \(3, 16, 24\)",
        ),
        ((0, 3, 16, 24), torch.zeros(0, 1, dtype=torch.long), "N >= 1"),
        ((1, 3, 16, 24), torch.zeros(1, dtype=torch.long), r"targets must be integers \(1, T\)"),
        ((1, 3, 16, 24), torch.zeros(2, 1, dtype=torch.long), r"targets must be integers \(1, T\).*\(2, 1\)"),
        ((1, 3, 16, 24), torch.zeros(1, 0, dtype=torch.long), "with T >= 1"),
        ((1, 3, 16, 24), torch.zeros(1, 1), "got torch.float32"),
        ((1, 3, 16, 24), torch.tensor([[0, 10]]), "target 10 is out of range, allowed are 0 to 9"),
        ((1, 3, 16, 24), torch.tensor([[-1, 0]]), "target -1 is out of range, allowed are 0 to 9"),
    ],
    ids=["three axes", "no image", "one axis", "other N", "no target", "float", "too large", "negative"],
)
def test_mistakes(method: str, shape: tuple[int, ...], targets: Tensor, message: str) -> None:
    name = {"bcos": "bcos_resnet20", "bcos_relative": "bcos_resnet20", "attention_rollout": "bcos_vit"}.get(
        method, "small_conv_net"
    )
    x = torch.rand(shape, dtype=torch.float64)
    if name.startswith("bcos"):
        x = torch.cat([x, 1 - x], dim=-3)
        message = message.replace(r"\(3,", r"\(6,")
    with pytest.raises(ValueError, match=message):
        quick(method)(make_model(name), x, targets)


def test_names() -> None:
    assert list_methods() == list(METHODS)
    assert {"bcos", "int_grad", "grad_cam", "lime", "rise", "occlusion13", "attention_rollout"} <= set(METHODS)
    with pytest.raises(ValueError, match="unknown explanation method 'intgrad'; did you mean int_grad"):
        make_method("intgrad")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rise", {"n_mask": 3}, "'rise' has no option 'n_mask'; did you mean n_masks"),
        ("grad_cam", {"interpolate": "nearest"}, "did you mean interpolation"),
        ("gradient", {"n": 3}, "'gradient' has no option 'n'; it has none"),
        ("rise", {"n_masks": 0}, "n_masks=0: an integer of at least 1"),
        ("rise", {"p": 0}, "p=0: above 0 and at most 1"),
        ("int_grad", {"n_steps": 2.5}, "n_steps=2.5: an integer"),
        ("int_grad", {"batch_size": True}, "batch_size=True: an integer"),
        ("smooth_grad", {"noise": -0.1}, "noise=-0.1: a finite number of at least 0"),
        ("lime", {"ratio": 2}, "ratio=2: between 0 and 1"),
        ("lime", {"kernel_width": 0}, "kernel_width=0: a finite number above 0"),
        ("lime", {"alpha": -1}, "alpha=-1"),
        ("occlusion5", {"kernel": 4}, "kernel=4: an odd number"),
        ("grad_cam", {"interpolation": "cubic"}, "interpolation='cubic': nearest or bilinear"),
        ("attention_rollout", {"interpolation": "cubic"}, "interpolation='cubic': nearest or bilinear"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, **options)


@pytest.mark.parametrize("method", ["smooth_grad", "rise", "lime"])
def test_results_depend_on_the_seed(method: str) -> None:
    model, inputs = make_model("small_conv_net"), make_input("small_conv_net")
    first, again, other = (make_method(method, **QUICK[method], seed=seed)(model, *inputs) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert method == "lime" or not torch.equal(first, other)


@pytest.mark.parametrize(
    ("method", "package"),
    [("guided_backprop", "captum"), ("deep_lift", "captum"), ("lime", "scikit-image"), ("lime", "scikit-learn")],
)
def test_a_missing_library(method: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"scikit-image": "skimage", "scikit-learn": "sklearn"}.get(package, package)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install {package}$"):
        quick(method)(make_model("small_conv_net"), *make_input("small_conv_net"))


def test_importing_loads_no_library() -> None:
    code = "import sys, bcos_train.explanation.method; print(*({'captum', 'skimage', 'sklearn'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == []


@pytest.mark.parametrize("width", [96, 100, 224])
def test_token_grid(width: int) -> None:
    for side in (8, 14, 16):
        grid = -(-224 // side), -(-width // side)
        assert token_grid(grid[0] * grid[1], 224, width) == grid
    assert token_grid(197, 224, 224) is None
