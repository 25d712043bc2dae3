"""B-cos ResNet with explanations and color images, in one file that only needs PyTorch.

For reading, and for copying into projects that need the published weights without another dependency. Parameter names
equal those of the official checkpoints (github.com/B-cos/B-cos-v2), which load with ``strict=True``.

    model = bcos_resnet("resnet50")
    model.load_state_dict(torch.load("resnet_50-ead259efe4.pth", weights_only=True))
    result = explain(model.eval(), add_inverse(rgb))        # rgb: (1, 3, H, W) in [0, 1]
    matplotlib.pyplot.imshow(result["explanation"])

    python minimal_bcos_resnet.py [resnet18 [weights.pth [image.jpg]]]

The idea (Böhle et al., CVPR 2022, arXiv 2205.10268; TPAMI 2024, arXiv 2306.10898): a layer that computes W(x) x, where
the matrix W(x) depends on x, is linear once W(x) is held fixed. A network of such layers is then a product of matrices.
Each logit is w(x) · x for one vector w(x) as large as the image: an explanation that leaves nothing out.

Axes: N images, C channels, H height, W width, K classes.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1. The layers -------------------------------------------------------------------------------------------------------


class BcosConv2d(nn.Module):
    """B-cos convolution for B = 2: out = |cos(x, w)|^(B-1) ŵ·x, with a patch x, unit-norm weight ŵ and their cosine.

    A unit's output is large only if its weight is aligned with the patch, so training aligns the two, and w(x) looks
    like the image. |cos| is the nonlinearity; there is no bias and no activation function.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.linear = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out", nonlinearity="relu")
        self.is_explaining = False

    def forward(self, x: Tensor) -> Tensor:
        conv = self.linear
        unit_weight = conv.weight / torch.linalg.vector_norm(conv.weight, dim=(1, 2, 3), keepdim=True)
        out = F.conv2d(x, unit_weight, None, conv.stride, conv.padding)  # ŵ·x
        squares = x.square().sum(1, keepdim=True)
        sums = F.avg_pool2d(squares, conv.kernel_size, conv.stride, conv.padding, divisor_override=1)
        cos = out.abs() / (sums + 1e-6).sqrt()  # |ŵ·x| / ||x||
        # With a constant factor the layer is a matrix, and autograd multiplies the matrices of all layers.
        return (cos.detach() if self.is_explaining else cos) * out


class BatchNormUncentered2d(nn.Module):
    """Batch norm without mean subtraction: a pure scaling of each channel, so w(x) · x stays complete."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_mean", torch.zeros(channels))  # unused, but in the checkpoints
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        var = self.running_var
        if self.training:
            var = x.var(dim=(0, 2, 3), correction=0)
            self.running_var.lerp_(var.detach(), 0.1)
            self.num_batches_tracked.add_(1)
        return x * (self.weight * (var + 1e-5).rsqrt()).view(1, -1, 1, 1)


# 2. The network ------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the sum of linear maps is a linear map."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = BcosConv2d(channels, width, 3, stride, padding=1), BatchNormUncentered2d(width)
        self.conv2, self.bn2 = BcosConv2d(width, width, 3, padding=1), BatchNormUncentered2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return out + (x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = BcosConv2d(channels, width, 1), BatchNormUncentered2d(width)
        self.conv2, self.bn2 = BcosConv2d(width, width, 3, stride, padding=1), BatchNormUncentered2d(width)
        self.conv3, self.bn3 = BcosConv2d(width, 4 * width, 1), BatchNormUncentered2d(4 * width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


class BcosResNet(nn.Module):
    """``(N, 6, H, W) -> (N, K)``; the input contains each color and its complement, see :func:`add_inverse`."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = BcosConv2d(6, 64, 7, stride=2, padding=3), BatchNormUncentered2d(64)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                width, stride = 64 * 2**stage, 2 if stage > 0 and index == 0 else 1
                out_channels, downsample = width * block.expansion, None
                if stride > 1 or channels != out_channels:
                    conv = BcosConv2d(channels, out_channels, 1, stride)
                    downsample = nn.Sequential(conv, BatchNormUncentered2d(out_channels))
                blocks.append(block(channels, width, stride, downsample))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = BcosConv2d(channels, num_classes, 1)
        # The only constant of the network; it maps a zero output to a probability (sigmoid) of 1 / K.
        self.logit_bias = -math.log(max(num_classes - 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # Classification before the average: all positions pass through the same map.
        return self.fc(x).mean((2, 3)) + self.logit_bias


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def bcos_resnet(name: str, num_classes: int = 1000) -> BcosResNet:
    """Build one of :data:`ARCHITECTURES` with random weights."""
    return BcosResNet(*ARCHITECTURES[name], num_classes)


# 3. The explanation --------------------------------------------------------------------------------------------------


def add_inverse(rgb: Tensor) -> Tensor:
    """Encode ``(N, 3, H, W)`` in [0, 1] as [r, g, b, 1-r, 1-g, 1-b]: each color, also black, is its own direction."""
    return torch.cat([rgb, 1 - rgb], dim=1)


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the gradient of a logit with respect to the input is w(x)."""
    before = {module: module.is_explaining for module in model.modules() if isinstance(module, BcosConv2d)}
    try:
        for conv in before:
            conv.is_explaining = True
        yield
    finally:
        for conv, state in before.items():
            conv.is_explaining = state


def explain(model: nn.Module, x: Tensor, class_index: int | None = None) -> dict[str, Any]:
    """Explain one class, by default the predicted one, for one image ``x`` ``(1, 6, H, W)``.

    Returns ``prediction``, ``explained_class_idx``, ``dynamic_linear_weights`` w(x) ``(1, 6, H, W)``, the
    ``contribution_map`` ``(1, H, W)``, whose sum is the logit minus its bias, and ``explanation`` ``(H, W, 4)``.
    """
    if model.training or x.shape[:2] != (1, 6):
        raise ValueError(f"needs x (1, 6, H, W) and model.eval(), got {tuple(x.shape)} and {model.training=}")
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), explanation_mode(model):
        logits = model(x)[0]
        prediction = int(logits.argmax())
        target = prediction if class_index is None else class_index
        (weights,) = torch.autograd.grad(logits[target], x)
    return {
        "prediction": prediction,
        "explained_class_idx": target,
        "dynamic_linear_weights": weights,
        "contribution_map": (weights * x.detach()).sum(1),
        "explanation": color_image(x.detach()[0], weights[0]),
    }


def color_image(x: Tensor, weights: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """Convert w(x) to a color image: ``(6, H, W)`` and ``(6, H, W) -> (H, W, 4)``, RGB and opacity in [0, 1].

    A pixel's positive weights for r and 1-r determine how red it is. Its opacity grows with the norm of its weights; it
    is transparent where its contribution is negative. ``smooth`` is the (odd) width of the window over which opacity is
    averaged; from ``percentile`` on, pixels are fully opaque.
    """
    positive = (weights / (weights.abs().amax(0, keepdim=True) + 1e-12)).clamp(min=0)
    rgb = positive[:3] / (positive[:3] + positive[3:] + 1e-12)
    alpha = torch.where((weights * x).sum(0) < 0, 1e-12, weights.norm(dim=0))[None]
    alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=smooth // 2)
    alpha = (alpha / torch.quantile(alpha, percentile / 100)).clamp(0, 1)
    return torch.cat([rgb, alpha]).permute(1, 2, 0)


# 4. A demonstration --------------------------------------------------------------------------------------------------


def load_image(path: str) -> Tensor:
    """Load an image file, resize its shorter side to 256 pixels, crop the center 224 x 224: ``(1, 6, 224, 224)``."""
    from PIL import Image

    image = Image.open(path)
    if image.mode[0] in "IF":  # conversion to RGB would clip
        raise ValueError(f"{path}: mode {image.mode} has more than 8 bits per channel; convert it to 8 bits first")
    size = [int(256 * side / min(image.size)) for side in image.size]
    image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in image.size)
    pixels = bytearray(image.crop((left, top, left + 224, top + 224)).tobytes())
    return add_inverse(torch.frombuffer(pixels, dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)[None] / 255)


def main(name: str = "resnet18", weights: str | None = None, image: str | None = None) -> None:
    torch.manual_seed(0)
    model = bcos_resnet(name).eval()
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    x = add_inverse(torch.rand(1, 3, 224, 224)) if image is None else load_image(image)
    result = explain(model, x)
    print(f"class {result['prediction']}, logit {model(x).max().item():.5f}")
    print(f"w(x) x + bias = {result['contribution_map'].sum().item() + model.logit_bias:.5f}")
    if image is not None:
        from PIL import Image

        pixels = (result["explanation"] * 255).round().byte()
        Image.frombytes("RGBA", (224, 224), bytes(pixels.flatten().tolist())).save("explanation.png")
        print("explanation.png written")


if __name__ == "__main__":
    main(*sys.argv[1:])
