"""Perturbation methods and attention rollout, against loops over images, targets, pixels and masks."""

import math
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SkLearnRidge
from method_models import NAMES, assert_same, encode, make_input, make_model
from skimage.segmentation import quickshift
from torch import Tensor, nn

from bcos_train.explanation.method import CannotExplain, Lime, Rise, make_method


@torch.no_grad()
def outputs(name: str, image: Tensor, is_probability: bool = True) -> Tensor:
    """Model outputs (K,) for one image (3, H, W)."""
    model = make_model(name).eval()
    logits = model(encode(name, image[None]))
    model.train()
    if not is_probability:
        return logits[0]
    return (logits.sigmoid() if name.startswith("bcos") else logits.softmax(1))[0]


# RISE.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_rise(name: str, batch_size: int) -> None:
    x, targets = make_input(name)
    method = Rise(n_masks=6, cells=3, p=0.4, seed=5, batch_size=batch_size)
    masks = method._masks(*method._draw(x), x)
    expected = torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    for n in range(2):
        for mask in masks:
            probability = outputs(name, x[n, :3] * mask)
            for t, k in enumerate(targets[n].tolist()):
                expected[n, t] += probability[k] * mask / (6 * 0.4)
    assert_same(method(make_model(name), x, targets), expected)


def test_rise_masks_are_upsampled_and_shifted_grids() -> None:
    x = torch.zeros(1, 3, 16, 24, dtype=torch.float64)
    method = Rise(n_masks=5, cells=3, p=0.5)
    grids, shifts = method._draw(x)
    height, width = math.ceil(16 / 3), math.ceil(24 / 3)
    for mask, grid, (top, left) in zip(method._masks(grids, shifts, x), grids, shifts, strict=True):
        assert set(grid.flatten().tolist()) <= {0.0, 1.0}
        assert 0 <= top < height
        assert 0 <= left < width
        for i in range(16):
            for j in range(24):
                # Pixel centers in units of the grid's cells, whose centers are whole numbers.
                y = min(max((i + top + 0.5) * 3 / (4 * height) - 0.5, 0), 2)
                z = min(max((j + left + 0.5) * 3 / (4 * width) - 0.5, 0), 2)
                value = sum(
                    max(0, 1 - abs(y - a)) * max(0, 1 - abs(z - b)) * grid[a, b].item()
                    for a in range(3)
                    for b in range(3)
                )
                assert mask[i, j].item() == pytest.approx(value, abs=1e-12)


def test_rise_shows_each_pixel_with_probability_p() -> None:
    x = torch.zeros(1, 3, 30, 40)
    method = Rise(n_masks=4000, p=0.3)
    masks = method._masks(*method._draw(x), x)
    assert masks.mean().item() == pytest.approx(0.3, abs=0.01)
    assert (masks.mean(0) - 0.3).abs().max() < 0.05
    assert len({tuple(shift) for shift in method._draw(x)[1]}) == 4 * 5  # every shift within a cell


# Occlusion.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kernel", "stride"), [(5, 4), (1, 8), (13, 7)])
def test_occlusion(name: str, kernel: int, stride: int) -> None:
    x, targets = make_input(name)
    expected = torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    for n in range(2):
        original = outputs(name, x[n, :3], is_probability=False)
        for i in range(0, 16, stride):
            for j in range(0, 24, stride):
                image = x[n, :3].clone()
                inside = [
                    (a, b) for a in range(16) for b in range(24) if max(abs(a - i), abs(b - j)) <= (kernel - 1) // 2
                ]
                for a, b in inside:
                    image[:, a, b] = 0
                loss = original - outputs(name, image, is_probability=False)
                for a, b in inside:
                    expected[n, :, a, b] += loss[targets[n]] / len(inside)
    for batch_size in (1, 7, 64):
        method = make_method("occlusion9", kernel=kernel, stride=stride, batch_size=batch_size)
        assert_same(method(make_model(name), x, targets), expected)


def test_occlusion_of_a_linear_model_by_hand() -> None:
    """Windows of one pixel result in the pixel's contribution."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    maps = make_method("occlusion5", kernel=1, stride=1)(model, x, torch.tensor([[1, 0]]))
    assert_same(maps[0, 0], (x[0] * model[1].weight[1].view(3, 2, 2)).sum(0).detach())


@pytest.mark.parametrize(
    ("name", "kernel", "stride"), [("occlusion5", 5, 2), ("occlusion9", 9, 2), ("occlusion13", 13, 4)]
)
def test_occlusion_sizes(name: str, kernel: int, stride: int) -> None:
    method: Any = make_method(name)
    assert (method.kernel, method.stride) == (kernel, stride)


# LIME.


def slow_lime(name: str, x: Tensor, targets: Tensor, method: Lime) -> tuple[Tensor, list[list[int]]]:
    """Coefficients (T, S) of captum's Lime and the segment indices for one image (C, H, W)."""
    image = x[:3]
    scaled = image if name.startswith("bcos") else (image - image.min()) / (image.max() - image.min())
    segments = quickshift(scaled.movedim(0, 2).numpy(), kernel_size=2, max_dist=5, ratio=0.2)
    n_segments = segments.max() + 1
    mean = image.clone()
    for s in range(n_segments):
        mean[:, segments == s] = image[:, segments == s].mean(1, keepdim=True)
    shown = method.draw_visible(n_segments)

    def rows(*_: Any, **__: Any) -> Any:
        yield from shown[:, None]

    def likeness(original: Tensor, perturbed: Tensor, row: Tensor, **_: Any) -> float:
        distance = 1 - F.cosine_similarity(row[0].double(), torch.ones(n_segments).double(), dim=0).item()
        return math.sqrt(math.exp(-(distance**2) / 0.25**2))

    coefficients = []
    for k in targets.tolist():
        lime = captum.attr.Lime(
            lambda images, k=k: torch.stack([outputs(name, image)[k] for image in images]),
            interpretable_model=SkLearnRidge(alpha=1.0),
            similarity_func=likeness,
            perturb_func=rows,
        )
        options = {"feature_mask": torch.from_numpy(segments)[None, None], "return_input_shape": False}
        coefficients.append(lime.attribute(image[None], baselines=mean[None], n_samples=len(shown), **options)[0])
    return torch.stack(coefficients), segments.tolist()


@pytest.mark.parametrize("name", ["bcos_resnet20", "small_conv_net"])
def test_lime(name: str) -> None:
    (x, targets), model = make_input(name), make_model(name)
    method = Lime(n_samples=30, n_features=2, kernel_size=2, max_dist=5, seed=3, batch_size=8)
    maps = method(model, x, targets)
    marked = 0
    for n in range(2):
        coefficients, segments = slow_lime(name, x[n], targets[n], method)
        for t in range(3):
            positive = [s for s in coefficients[t].argsort(descending=True).tolist() if coefficients[t, s] > 0]
            best = positive[:2]
            expected = torch.tensor([[float(s in best) for s in row] for row in segments], dtype=torch.float64)
            assert torch.equal(maps[n, t], expected)
            marked += len(best)
            assert len(coefficients[t]) > 3
    assert marked > 0


def test_lime_coefficients_equal_captum() -> None:
    name, (x, targets) = "small_conv_net", make_input("small_conv_net")
    method, model = Lime(n_samples=30, kernel_size=2, max_dist=5, seed=3), make_model(name)
    expected, segments = slow_lime(name, x[0], targets[0], method)
    found = method.segments(x[0, :3])
    assert found.tolist() == segments
    shown = method.draw_visible(int(found.max()) + 1)
    with torch.no_grad():
        probability = method._probabilities(model.eval(), x[0], found, shown, targets[0])
    model.train()
    assert_same(method.fit(shown, probability), expected.double(), 1e-3)  # captum computes in float32


def test_lime_needs_an_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 2))
    with pytest.raises(CannotExplain, match="segments RGB images, but the model takes 4 channels"):
        make_method("lime")(model, torch.rand(1, 4, 4, 4), torch.tensor([[0]]))


# Attention rollout.


@pytest.mark.parametrize("is_explaining", [False, True], ids=["fused", "explanation mode"])
def test_attention_rollout(is_explaining: bool) -> None:
    model, (x, targets) = make_model("bcos_vit").eval(), make_input("bcos_vit")
    blocks = list(model[0].transformer)
    tokens = model[0].positional_embedding(model[0].to_patch_embedding(x)).detach()
    product = torch.eye(24).double().repeat(2, 1, 1)
    for block in blocks:
        q, k, _ = block.attn.to_qkv(block.attn.norm(tokens)).detach().chunk(3, dim=-1)
        step = torch.zeros(2, 24, 24).double()
        for head in (slice(0, 8), slice(8, 16)):
            for n in range(2):
                step[n] += (q[n, :, head] @ k[n, :, head].T / math.sqrt(8)).softmax(1) / 2
        product = (step / 2 + torch.eye(24) / 2) @ product
        tokens = block(tokens).detach()
    expected = product.mean(1).view(2, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    if is_explaining:
        with model.explanation_mode():
            maps = make_method("attention_rollout")(model, x, targets)
    else:
        maps = make_method("attention_rollout")(model, x, targets)
    model.train()
    assert_same(maps, expected)
    assert maps[0, 0].std() > 0


def test_attention_rollout_with_a_class_token() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.VisionTransformer(**options).eval()
    x = torch.rand(2, 3, 32, 32)
    found: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, __: found.append(args[0].detach()))
    model(x)
    product = torch.eye(17)
    for matrix in found:
        product = (matrix.mean(1) / 2 + torch.eye(17) / 2) @ product
    expected = product[:, 0, 1:].view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for is_fused in (False, True):
        for block in model.blocks:
            block.attn.fused_attn = is_fused
        assert_same(make_method("attention_rollout")(model, x, torch.tensor([[0], [1]])), expected, 1e-5)


def test_attention_rollout_needs_attention() -> None:
    with pytest.raises(CannotExplain, match=r"SmallConvNet has no self-attention .*vision transformers"):
        make_method("attention_rollout")(make_model("small_conv_net"), *make_input("small_conv_net"))
