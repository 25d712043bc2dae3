"""Gradient checkpointing: the same numbers in less memory."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import images, perturb_
from torch import Tensor, nn

from bcos_train import create_model, explain
from bcos_train.config import check
from bcos_train.config.composition import Composer
from bcos_train.model import BcosVGG
from bcos_train.model.grad_checkpointing import CheckpointedBlocks
from bcos_train.nn import BatchNormUncentered2d, BcosConv2d, set_backend
from bcos_train.training.config import TrainConfig


class ThinVGG(BcosVGG):
    planes = (4, 4, 8, 8, 8)


def small_vgg() -> ThinVGG:
    """Without the large layers before the last."""
    model = ThinVGG((1, 2, 1, 1, 1), num_classes=5)
    model.classifier, model.logit_conv_name = model.conv_layer(8, 5, kernel_size=1), "classifier"
    return model


COMPOSER = Composer(Path(__file__).parents[2] / "configs")
DENSE: dict[str, Any] = {"growth_rate": 4, "num_init_features": 8, "block_config": (3, 2), "drop_rate": 0.3}
RESNET: dict[str, Any] = {"inplanes": 4, "stochastic_depth_prob": 0.5}
VIT: dict[str, Any] = {"dim": 16, "depth": 3, "heads": 2, "mlp_dim": 32, "num_classes": 5}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(create_model, "resnet20", **RESNET),
    "resnet of bottlenecks": partial(create_model, "resnext29_16x8d", inplanes=8),
    "resnet with centered norm": partial(create_model, "resnet20", norm_layer="bn", **RESNET),
    "densenet": partial(create_model, "densenet52", **DENSE),
    "densenet with centered norm": partial(create_model, "densenet52", norm_layer="bn", **DENSE),
    "convnext": partial(
        create_model,
        "convnext_atto",
        layers=(1, 2),
        channels=(8, 16),
        num_classes=5,
        norm_layer="bnu-linear",
        stochastic_depth_prob=0.5,
    ),
    "vgg": small_vgg,
    "vit": partial(create_model, "simple_vit_ti_patch16_224", patch_size=4, **VIT),
    "vitc": partial(create_model, "vitc_ti_patch1_14", stem=(8, 16), **VIT),
    "standard vit": partial(create_model, "standard_simple_vit_ti_patch16_224", patch_size=4, **VIT),
}


@pytest.fixture(params=BUILD)
def twins(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Build a network in training mode and a copy with gradient checkpointing."""
    torch.manual_seed(0)
    plain: Any = BUILD[request.param]().double()
    perturb_(plain)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    return plain, again


def batch(model: Any, n: int = 2, seed: int = 0) -> Tensor:
    return images(32, n, seed=seed, dtype=torch.float64)[:, : model.in_chans]


def two_steps(model: Any) -> dict[str, Tensor]:
    """Return all state after two training steps, including that of the random number generator."""
    out: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for step in range(2):
        out[f"logits {step}"] = logits = model(batch(model, seed=step))
        logits.square().sum().backward()
    out |= {f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}
    return {**out, **dict(model.named_buffers()), "random numbers": torch.get_rng_state()}


def test_same_numbers(twins: tuple[Any, Any]) -> None:
    """Recomputation doesn't count a batch twice in the running statistics."""
    expected, got = map(two_steps, twins)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def kept_bytes(model: Any) -> int:
    """Return the bytes that a forward pass stores for the backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch(model))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_stores_fewer_activations(twins: tuple[Any, Any]) -> None:
    plain, again = twins
    before = kept_bytes(plain)
    assert kept_bytes(again) < 0.7 * before
    again.set_grad_checkpointing(False)
    assert kept_bytes(again) == before


def count_calls(model: nn.Module) -> list[nn.Module]:
    """Return a list that grows by one at each call of a block."""
    calls: list[nn.Module] = []
    for blocks in model.modules():
        for block in blocks if isinstance(blocks, CheckpointedBlocks) else ():
            block.register_forward_pre_hook(lambda module, _: calls.append(module))
    return calls


def test_recomputes_only_in_training(twins: tuple[Any, Any]) -> None:
    _, model = twins
    calls = count_calls(model)
    n = sum(len(blocks) for blocks in model.modules() if isinstance(blocks, CheckpointedBlocks))
    model(batch(model)).sum().backward()
    assert len(calls) == 2 * n
    with torch.no_grad():
        model(batch(model))
    assert len(calls) == 3 * n
    model.eval()(batch(model)).sum().backward()
    assert len(calls) == 4 * n


@pytest.mark.parametrize("name", [name for name in BUILD if name != "standard vit"])
def test_explanations_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    plain: Any = BUILD[name]().double().eval()
    perturb_(plain)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    x = batch(plain)
    assert torch.equal(explain(again, x).weights, explain(plain, x).weights)
    assert again.explain(x[:1])["prediction"] == plain.explain(x[:1])["prediction"]


def test_explanation_mode_in_training() -> None:
    """A gradient taken after explanation mode has ended, which recomputes the blocks then, is still W(x)."""
    torch.manual_seed(0)
    plain: Any = create_model("densenet52", **{**DENSE, "drop_rate": 0.0}).double()
    perturb_(plain)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    weights = []
    for model in (plain, again):
        leaf = batch(model).requires_grad_()
        with model.explanation_mode():
            logits = model(leaf)
        weights.append(torch.autograd.grad(logits.sum(), leaf)[0])
    assert torch.equal(*weights)
    # A loss on explanations, and its second derivatives.
    grads = []
    for model in (plain, again):
        loss = explain(model, batch(model), 1, create_graph=True).contribution_map.square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)


def test_an_error_while_recomputing_leaves_the_statistics() -> None:
    model: Any = create_model("resnet20", grad_checkpointing=True, **RESNET)
    logits = model(images(16))
    kept = {key: (buffer, buffer.clone()) for key, buffer in model.named_buffers()}
    model.layer3[2].bn2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits.sum().backward()
    for key, buffer in model.named_buffers():
        assert buffer is kept[key][0]
        assert torch.equal(buffer, kept[key][1])


def test_several_backward_passes_through_one_graph() -> None:
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = create_model("resnet20", **RESNET, grad_checkpointing=enable).double().train()
        x = images(16).double().requires_grad_()
        out = model(x)
        grads.append([torch.autograd.grad(out[:, k].sum(), x, retain_graph=True)[0] for k in range(2)])
        counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, BatchNormUncentered2d)}
        assert counts == {1}
    for ours, expected in zip(*reversed(grads), strict=True):
        assert torch.equal(ours, expected)


def test_copies_keep_it() -> None:
    model = create_model("resnet20", grad_checkpointing=True, **RESNET)
    assert list(model.state_dict()) == list(create_model("resnet20", **RESNET).state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(blocks.grad_checkpointing for blocks in twin.modules() if isinstance(blocks, CheckpointedBlocks))


def test_compiled() -> None:
    """A compiler must not count a batch twice either."""
    torch.manual_seed(0)
    plain = CheckpointedBlocks(nn.Sequential(BcosConv2d(6, 4, 3), BatchNormUncentered2d(4))).double()
    set_backend(plain, "reference")
    again = copy.deepcopy(plain)
    again.grad_checkpointing = True
    compiled: Any = torch.compile(again, backend="aot_eager")
    for model in (plain, compiled):
        model(images(8, 2, dtype=torch.float64)).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_of_several_modules() -> None:
    blocks = CheckpointedBlocks(*(nn.Linear(3, 3) for _ in range(6)))
    blocks.block_lengths = (2, 3)
    x = torch.rand(2, 3)
    plain = nn.Sequential(*blocks)(x)
    assert torch.equal(blocks(x), plain)
    blocks.grad_checkpointing = True
    assert torch.equal(blocks(x), plain)  # the last one too
    assert torch.equal(blocks[:4](x), nn.Sequential(*blocks[:4])(x))
    inputs: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: inputs.append(tensor) or tensor, lambda tensor: tensor
    ):
        blocks(x.requires_grad_())
    assert sum(tensor.numel() > 0 for tensor in inputs) == 3  # torch 2.11 saves an empty tensor with each


# ---- where it is chosen


def are_on(model: nn.Module) -> set[bool]:
    return {blocks.grad_checkpointing for blocks in model.modules() if isinstance(blocks, CheckpointedBlocks)}


def test_options() -> None:
    assert are_on(create_model("resnet20")) == {False}
    assert are_on(create_model("resnet20", grad_checkpointing=True)) == {True}
    assert are_on(create_model("densenet52", memory_efficient=True)) == {True}
    with torch.device("meta"):
        assert are_on(create_model("standard_vitc_ti_patch1_14", grad_checkpointing=True)) == {True}


@pytest.mark.parametrize("name", ["plain_cnn9", "standard_resnet18"])
def test_networks_without_blocks(name: str) -> None:
    model = create_model(name)
    message = f"grad_checkpointing: {type(model).__name__} has no blocks to recompute in the backward pass; B-cos "
    with pytest.raises(ValueError, match=message):
        create_model(name, grad_checkpointing=True)


def test_config() -> None:
    def problems(*overrides: str) -> list[str]:
        return [str(problem) for problem in check(COMPOSER.compose("train", [*overrides]), root=TrainConfig)]

    overrides = ["model=resnet20", "dataset=digits"]
    assert problems(*overrides, "+model.grad_checkpointing=true") == []
    assert problems(*overrides, "+model.grad_checkpointing=5") == ["model.grad_checkpointing=5: expected true or false"]
