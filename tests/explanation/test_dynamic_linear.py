"""explain() and constant_term(): against the official code, one by one, and in float64."""

import copy
import warnings
from typing import Any

import pytest
import torch
from bcos.models.resnet import cifar10_resnet20
from bcos.modules import norms as official_norms
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.explanation import constant_term, dynamic_linear_weights, explain, explanation_mode
from bcos_train.nn import BcosConv2d, BcosLinear, LogitLayer, make_norm

NORMS = ["none", "bnu-linear", "bnu", "bn", "an", "anu", "gn", "gnu", "in", "inu", "ln", "lnu", "pn", "pnu"]


def small_model(norm: str = "bnu", classes: int = 5, in_channels: int = 6, **logit: float) -> nn.Sequential:
    """Two B-cos convolutions and a linear head; every parameter and statistic is away from its initial value."""
    torch.manual_seed(0)
    model = nn.Sequential(
        BcosConv2d(in_channels, 8, 3, padding=1, max_out=2),
        make_norm(norm)(8),
        BcosConv2d(8, 8, 3, stride=2, padding=1, b=1.5),
        make_norm(norm)(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        BcosLinear(8, classes),
        LogitLayer(**({"logit_temperature": 0.05, "logit_bias": -1.3} | logit)),
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.5)
        elif name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
    return model.double().eval()


def encoded(n: int, size: int = 10, seed: int = 1) -> Tensor:
    rgb = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([rgb, 1 - rgb], 1)


def one_by_one(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """W(x) the slow and obvious way: each image on its own, `detach` set by hand."""
    for module in model.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(True)
    rows = []
    for image, k in zip(x, target, strict=True):
        leaf = image[None].clone().requires_grad_()
        rows.append(torch.autograd.grad(model(leaf)[0, k], leaf)[0])
    for module in model.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(False)
    return torch.cat(rows)


def test_batch_equals_single_images():
    model, x, target = small_model(), encoded(4), torch.tensor([0, 4, 2, 2])
    result = explain(model, x, target)
    weights = one_by_one(model, x, target)
    torch.testing.assert_close(result.weights, weights, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.contribution_map, (x * weights).sum(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.logits, model(x).detach(), rtol=0, atol=0)
    assert torch.equal(result.prediction, model(x).argmax(1))
    assert torch.equal(result.target, target)


@pytest.mark.parametrize("norm", NORMS)
def test_contributions_and_constant_sum_to_the_logit(norm: str):
    model, x = small_model(norm), encoded(3)
    for target in (None, 1, torch.tensor([4, 0, 3])):
        result = explain(model, x, target)
        logit = result.logits.gather(1, result.target[:, None])[:, 0]
        total = result.contribution_map.sum((1, 2)) + constant_term(model, x, target)
        torch.testing.assert_close(total, logit, rtol=1e-12, atol=1e-12)


def test_constant_term_of_a_network_without_other_biases_is_the_logit_bias():
    constant = constant_term(small_model("bnu-linear"), encoded(2))
    torch.testing.assert_close(constant, torch.full((2,), -1.3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_constant_term_sees_in_place_addition_position_embeddings_and_keyword_inputs():
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.attend = Positions(), nn.Softmax(-1)
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mT
            tokens = tokens + self.positions(x=tokens)
            mixed = self.inner(input=tokens)
            mixed *= 2
            mixed += tokens
            attention = self.attend(tokens.detach() @ tokens.detach().mT)
            return self.head((attention @ mixed).mean(1))

    torch.manual_seed(0)
    model, x = Net().double().eval(), encoded(3, size=4)
    result = explain(model, x)
    total = result.contribution_map.sum((1, 2)) + constant_term(model, x)
    torch.testing.assert_close(total, result.logits.amax(1), rtol=1e-12, atol=1e-12)


def constant_term_of_each_image(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The constant term the slow and obvious way: each image on its own, the constants of all modules."""
    constants: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not any(arg.requires_grad for arg in args):
            return None
        with torch.no_grad():
            constant = module.forward(*(torch.zeros_like(arg) if arg.requires_grad else arg for arg in args))
        point = output if output.requires_grad else output.requires_grad_()
        constants.append((point, constant))
        return point.clone()

    handles = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
    terms = []
    with explanation_mode(model):
        for image, k in zip(x, target, strict=True):
            constants.clear()
            logit = model(image[None].clone().requires_grad_())[0, k]
            grads = torch.autograd.grad(logit, [point for point, _ in constants], allow_unused=True)
            pairs = zip(grads, constants, strict=True)
            terms.append(sum((grad * value).sum() for grad, (_, value) in pairs if grad is not None))
    for handle in handles:
        handle.remove()
    return torch.stack(terms)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet20", 8, {"norm_layer": "bn", "max_out": 2}),
        ("resnet18", 32, {}),
        ("resnet50", 32, {"layers": (1, 1, 1, 1), "norm_layer": "gn"}),
        ("resnext29_32x4d", 8, {"norm_layer": "bnu"}),
        ("densenet121", 32, {"block_config": (2, 2)}),
        ("vgg11_bnu", 32, {}),
        ("convnext_atto", 32, {}),
        ("simple_vit_ti_patch16_224", 64, {"depth": 2}),
        ("vitc_ti_patch1_14", 32, {"depth": 2}),
        ("plain_cnn9", 16, {}),
    ],
)
def test_constant_term_of_a_batch_is_that_of_each_image(name: str, size: int, options: dict[str, Any]):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options).double().eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.5)
    x, target = encoded(3, size), torch.tensor([0, 4, 2])
    terms = constant_term(model, x, target)
    torch.testing.assert_close(terms, constant_term_of_each_image(model, x, target), rtol=1e-12, atol=1e-12)
    prediction = model(x).argmax(1)
    assert torch.equal(constant_term(model, x), constant_term(model, x, prediction))


def test_constant_term_takes_one_pass_for_a_batch_and_never_waits_for_the_device(monkeypatch):
    calls, model, x = [], small_model("bn"), encoded(3)
    model.register_forward_hook(lambda *_: calls.append(1))
    reads = []
    for name in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: reads.append(name))
    constant_term(model, x)
    assert calls == [1]
    assert not reads


def test_no_tf32():
    inside = []

    def look(*_):
        inside.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    model = small_model()
    model.register_forward_hook(look)
    before = torch.backends.cudnn.allow_tf32
    explain(model, encoded(1))
    constant_term(model, encoded(1))
    assert inside == [(False, False)] * 2
    assert torch.backends.cudnn.allow_tf32 == before


def test_constant_term_does_not_use_the_logit():
    """So a network that is no dynamic linear map (an activation that is not frozen) does not add up."""
    model, x = small_model("bnu-linear"), encoded(2)
    model.insert(1, nn.GELU())
    result = explain(model, x, 0)
    evidence = result.logits[:, 0] + 1.3
    total = result.contribution_map.sum((1, 2)) + constant_term(model, x, 0)
    assert ((total - result.logits[:, 0]).abs() > 0.01 * evidence.abs()).all()


def test_constant_term_leaves_no_hooks_and_refuses_training_mode():
    model = small_model()
    constant_term(model, encoded(1))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"evaluation mode.*training mode"):
        constant_term(model.train(), encoded(1))


@pytest.mark.filterwarnings("ignore:Input tensor did not require grad")
@pytest.mark.parametrize("idx", [None, 7], ids=["prediction", "class-7"])
def test_equals_the_official_explain(idx: int | None):
    torch.manual_seed(0)
    norm = official_norms.NoBias(official_norms.BatchNormUncentered2d)
    model = cifar10_resnet20(num_classes=10, norm_layer=norm, logit_temperature=0.1).eval()
    for x in encoded(2, size=32).float():
        official = model.explain(x[None].clone(), idx=idx)
        result = explain(model, x[None], idx)
        assert result.prediction.item() == official["prediction"]
        assert result.target.item() == official["explained_class_idx"]
        torch.testing.assert_close(result.weights, official["dynamic_linear_weights"])
        torch.testing.assert_close(result.contribution_map, official["contribution_map"].detach())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_side_effects_on_tensors_gradients_and_state(requires_grad: bool):
    model, x = small_model(), encoded(2).requires_grad_(requires_grad)
    x.grad = torch.ones_like(x) if requires_grad else None
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    before, state = x.detach().clone(), copy.deepcopy(model.state_dict())
    first = explain(model, x)
    kept = first.weights.clone()
    explain(model, x, 1)
    assert torch.equal(first.weights, kept)  # the second call does not overwrite the first
    assert torch.equal(x.detach(), before)
    assert x.requires_grad == requires_grad
    assert (x.grad == 1).all() if requires_grad else x.grad is None
    assert all((parameter.grad == 3).all() for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(t.requires_grad for t in vars(first).values())
    assert not model.training
    assert not model[0].is_in_explanation_mode


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_with_autograd_disabled(context: type):
    model = small_model()
    for target in (None, [3, 1]):
        labels = None if target is None else torch.tensor(target)
        expected, expected_constant = explain(model, encoded(2), labels), constant_term(model, encoded(2), labels)
        with context():
            x, labels = encoded(2), None if target is None else torch.tensor(target)
            result, constant = explain(model, x, labels), constant_term(model, x, labels)
        assert torch.equal(result.weights, expected.weights)
        assert torch.equal(constant, expected_constant)


def test_channels_last_and_autocast():
    model, x = small_model().float(), encoded(2).float()
    expected = explain(model, x, 0)
    result = explain(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 0)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        lower = explain(model, x, 0)
    assert lower.weights.dtype == lower.logits.dtype == lower.contribution_map.dtype == torch.float32
    torch.testing.assert_close(
        lower.weights, expected.weights, rtol=0.1, atol=0.1 * float(expected.weights.abs().max())
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target 5 is out of range, allowed are 0 to 4"),
        (-1, "target -1 is out of range, allowed are 0 to 4"),
        (torch.tensor([0, 9]), "target 9 is out of range, allowed are 0 to 4"),
        (torch.tensor([0, 1, 2]), r"an int or of shape \(2,\), got shape \(3,\)"),
        (torch.tensor([[0, 1]]), r"an int or of shape \(2,\), got shape \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), "integer class indices, got torch.float32"),
    ],
    ids=["above", "negative", "one-above", "wrong-length", "two-dimensional", "float"],
)
@pytest.mark.parametrize("function", [explain, constant_term])
def test_wrong_target(function, target: Tensor | int, message: str):
    with pytest.raises(ValueError, match=message):
        function(small_model(), encoded(2), target)


@pytest.mark.parametrize(
    "x",
    [torch.rand(6, 8, 8), torch.rand(0, 6, 8, 8), torch.zeros(1, 6, 8, 8, dtype=torch.uint8)],
    ids=["3d", "empty", "uint8"],
)
def test_wrong_input(x: Tensor):
    with pytest.raises(ValueError, match=r"floating-point tensor \(N, C, H, W\)"):
        explain(small_model(), x)


@pytest.mark.parametrize(
    "tail",
    [nn.Unflatten(1, (1, 5)), nn.Flatten(0), nn.LSTM(5, 5, batch_first=True).double()],
    ids=["3d", "1d", "tuple"],
)
def test_wrong_output(tail: nn.Module):
    with pytest.raises(ValueError, match="the model must return"):
        explain(nn.Sequential(small_model(), tail).eval(), encoded(2))


def test_training_mode_warns_and_keeps_running_statistics():
    model, x = small_model().train(), encoded(4)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="training mode"):
        explain(model, x)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_create_graph_reaches_the_parameters_in_training_mode():
    model, x = small_model("gn").train(), encoded(2)
    model.insert(1, nn.BatchNorm2d(8).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = explain(model, x, 0, create_graph=True)
    result.contribution_map.square().sum().backward()
    assert model[1].num_batches_tracked == 1  # an ordinary forward pass
    gradient = model[0].linear.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_ddp_model_can_be_trained_between_explanations(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_model().float()
        wrapped, x = DistributedDataParallel(model), encoded(2).float()
        expected = explain(model, x)
        for _ in range(2):
            assert torch.equal(explain(wrapped, x).weights, expected.weights)
            wrapped(x).sum().backward()
    finally:
        dist.destroy_process_group()


def test_weights_are_the_product_of_the_layers_dynamic_weights():
    """W(x) written out for two B-cos linear layers (arXiv 2205.10268, eq. 13): S2 Ŵ2 S1 Ŵ1, S = diag |cos|^(B-1)."""
    torch.manual_seed(0)
    first, second = BcosLinear(24, 7, b=2.5), BcosLinear(7, 3, b=2)
    model, x = nn.Sequential(nn.Flatten(), first, second).double(), encoded(1, size=2)
    product, value = torch.eye(24, dtype=torch.float64), x.flatten()
    for layer in (first, second):
        unit = layer.linear.weight.detach() / layer.linear.weight.detach().norm(dim=1, keepdim=True)
        scale = ((unit @ value).abs() / value.norm()) ** (layer.b - 1)
        product, value = scale[:, None] * unit @ product, scale * (unit @ value)
    for k in range(3):
        torch.testing.assert_close(explain(model.eval(), x, k).weights.flatten(), product[k], rtol=1e-4, atol=1e-8)


def test_weights_alone_are_those_of_the_explanation() -> None:
    model = small_model().eval()
    x = torch.rand(3, 6, 6, 6, dtype=torch.float64)
    expected = explain(model, x, target=2)
    logits, weights = dynamic_linear_weights(model, x, target=2)
    for ours, theirs in ((weights, expected.weights), (logits, expected.logits)):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    _, weights = dynamic_linear_weights(model, x, create_graph=True)
    grads = torch.autograd.grad(weights.square().sum(), list(model.parameters()), allow_unused=True)
    assert any(grad is not None and grad.any() for grad in grads)
