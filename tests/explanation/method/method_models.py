"""Models and inputs for the tests of the explanation methods: float64, not square, more than one image and target."""

from functools import cache

import torch
from torch import Tensor, nn

from bcos_train import create_model


class SmallConvNet(nn.Module):
    """Network with biases that uses each type of layer that captum supports once."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(5, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SmallResNet(SmallConvNet):
    """Block as in torchvision: its single ReLU is called twice, and ReLU and sum are in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.features = nn.Sequential(nn.Conv2d(3, 5, 1), nn.MaxPool2d(2))
        self.downsample = nn.MaxPool2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward_features(self, x: Tensor) -> Tensor:
        out = self.downsample(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        out += self.features(x)
        return self.relu(out)


NAMES = ("bcos_resnet20", "bcos_vit", "small_resnet", "small_conv_net")


@cache
def make_model(name: str) -> nn.Module:
    """Build a model in training mode, which the methods must handle, with nonzero statistics and biases."""
    torch.manual_seed(0)
    if name.startswith("small"):
        model: nn.Module = SmallConvNet() if name == "small_conv_net" else SmallResNet()
    elif name == "bcos_vit":
        options = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "patch_size": 4}
        model = create_model("simple_vit_ti_patch16_224", num_classes=10, **options)
    else:
        model = create_model(name.removeprefix("bcos_"), num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(std=0.1) if module.bias is not None else None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.double().train()


def make_input(name: str, n_images: int = 2) -> tuple[Tensor, Tensor]:
    """Make x (N, C, 16, 24) with smooth shapes and some noise, so that no pixels tie, and targets (N, 3)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n_images, 3, 4, 6, generator=generator, dtype=torch.float64)
    image = nn.functional.interpolate(coarse, (16, 24), mode="bilinear")
    image = 0.9 * image + 0.1 * torch.rand(image.shape, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1, 3, 4], [0, 9, 2], [5, 5, 6]])[:n_images]
    return (torch.cat([image, 1 - image], 1) if name.startswith("bcos") else 3 * image - 1.5), targets


def encode(name: str, image: Tensor) -> Tensor:
    """Encode a perturbed image as the model's input."""
    return torch.cat([image, 1 - image], 1) if name.startswith("bcos") else image


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Assert equality up to this fraction of the largest expected value, which must not be zero."""
    largest = expected.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
