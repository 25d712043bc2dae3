"""Mean |cos| of each layer, against unfolded patches."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.metric import cosine_alignment
from bcos_train.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear


def patch_cosines(layer: BcosConv2d, x: Tensor) -> Tensor:
    """Slow reference: |cos| of each unfolded patch with the best of its MaxOut candidates."""
    conv = layer.linear
    channels = x.shape[1] // conv.groups
    outputs = conv.weight.shape[0] // conv.groups
    cosines = []
    for g in range(conv.groups):
        patches = F.unfold(
            x[:, g * channels : (g + 1) * channels], conv.kernel_size, conv.dilation, conv.padding, conv.stride
        )
        weight = conv.weight[g * outputs : (g + 1) * outputs].flatten(1)
        weight = weight / weight.norm(dim=1, keepdim=True)
        cosine = (weight @ patches) / (patches.square().sum(1, keepdim=True) + 1e-6).sqrt()
        cosines.append(cosine.unflatten(1, (-1, layer.max_out)).amax(2))
    return torch.cat(cosines, 1).abs()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "max_out": 2, "b": 1.5},
        {"kernel_size": 1, "b": 1},
        {"kernel_size": 3, "groups": 2, "max_out": 2},
        {"kernel_size": 3, "dilation": 2},
    ],
    ids=["plain", "maxout", "linear-b1", "groups", "dilation"],
)
def test_convolution_against_unfolded_patches(options: dict):
    torch.manual_seed(0)
    layer, x = BcosConv2d(6, 8, **options), torch.randn(3, 6, 9, 9)
    assert cosine_alignment(layer, x) == {"": pytest.approx(patch_cosines(layer, x).mean().item(), rel=1e-5)}


def test_linear_layer_by_hand():
    layer = BcosLinear(2, 2)
    layer.linear.weight.data = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    x = torch.tensor([[3.0, 0.0], [0.0, -5.0]])
    # |cos|: 1 and √½ for the first input, 0 and √½ for the second.
    assert cosine_alignment(layer, x)[""] == pytest.approx((1 + 2 * math.sqrt(0.5)) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_oblong_image_in_inference_mode(dtype: torch.dtype):
    torch.manual_seed(0)
    layer, x = BcosConv2d(6, 8, 3).to(dtype), torch.rand(1, 6, 5, 9, dtype=dtype)
    with torch.inference_mode():
        assert cosine_alignment(layer, x.clone())[""] == pytest.approx(patch_cosines(layer, x).mean().item(), rel=1e-5)


def test_nan_is_not_hidden():
    x = torch.rand(2, 6, 5, 5)
    x[0, 0, 2, 2] = math.nan
    assert math.isnan(cosine_alignment(BcosConv2d(6, 8, 3), x)[""])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = BcosConv2d(6, 4, 3)
        self.norm = BatchNormUncentered2d(4)
        self.drop = nn.Dropout(0.5)
        self.shared = BcosLinear(4, 4)
        self.unused = BcosLinear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.stem(x))).mean((2, 3))
        return self.shared(self.shared(x))


def test_names_shared_and_unused_layers():
    torch.manual_seed(0)
    net, x = Net().eval(), torch.rand(5, 6, 8, 8)
    result = cosine_alignment(net, x)
    assert list(result) == ["stem", "shared"]
    first = net.norm(net.stem(x)).mean((2, 3))
    calls = [cosine_alignment(net.shared, value)[""] for value in (first, net.shared(first))]
    assert result["shared"] == pytest.approx(sum(calls) / 2, rel=1e-5)


@pytest.mark.parametrize("fails", [False, True], ids=["completes", "raises"])
def test_model_is_unchanged(fails: bool):
    net = Net().train()
    net.norm.eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    x = torch.rand(2, 5 if fails else 6, 8, 8, generator=torch.Generator().manual_seed(0))
    if fails:
        with pytest.raises(RuntimeError):
            cosine_alignment(net, x)
    else:
        assert cosine_alignment(net, x) == cosine_alignment(net, x)  # no dropout in it
    assert [m.training for m in net.modules()] == [m is not net.norm for m in net.modules()]
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in net.parameters())
