"""The encodings equal the official CPU transforms bit for bit."""

import pytest
import torch
from bcos.data.transforms import AddInverse
from torch import Tensor
from torchvision import transforms as v1

from bcos_train.dataset.encoding import IMAGENET_MEAN, IMAGENET_STD, BcosEncoding, Standardize, add_inverse, to_float

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def images() -> Tensor:
    """Every value of uint8 in every channel, (2,3,16,16)."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    return torch.stack([values, values.flip(0), values.T]).repeat(2, 1, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_bcos_encoding_equals_official(images: Tensor, device: str) -> None:
    official = AddInverse()(v1.ConvertImageDtype(torch.float)(images))
    encoded = BcosEncoding()(images.to(device))
    assert encoded.dtype == torch.float32
    assert encoded.shape == (2, 6, 16, 16)
    assert torch.equal(encoded.cpu(), official)


@pytest.mark.parametrize("device", DEVICES)
def test_standardize_equals_official(images: Tensor, device: str) -> None:
    official = v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)(v1.ConvertImageDtype(torch.float)(images))
    assert torch.equal(Standardize().to(device)(images.to(device)).cpu(), official)


def test_forward_is_float_then_encode(images: Tensor) -> None:
    for encoding in (BcosEncoding(), Standardize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))):
        assert torch.equal(encoding(images), encoding.encode(to_float(images)))
        assert encoding(images).shape[1] == encoding.in_channels


def test_range_and_complement(images: Tensor) -> None:
    x = to_float(images)
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(x.mul(255).round().to(torch.uint8), images)
    encoded = add_inverse(x[0])
    assert encoded.shape == (6, 16, 16)
    assert (encoded[:3] + encoded[3:] - 1).abs().max() < 1e-6


def test_no_state() -> None:
    assert not Standardize().state_dict()
    assert not BcosEncoding().state_dict()


def test_wrong_type() -> None:
    with pytest.raises(ValueError, match=r"must be uint8.*float32"):
        to_float(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="std above 0"):
        Standardize(std=(1.0, 0.0, 1.0))


def test_repr() -> None:
    assert repr(Standardize()) == "Standardize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"
