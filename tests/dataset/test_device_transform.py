"""Crops and flips of a batch on the device equal the CPU's, sample by sample."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bcos_train.augmentation import crop_flip, digits_train, imagenet_train, plain
from bcos_train.dataset import DeviceTransform, NotCacheable, SeededDataset
from bcos_train.dataset.randomness import sample_seeds, torch_random_words

HEIGHT, WIDTH, N = 12, 17, 60


class Noise(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (N, HEIGHT, WIDTH, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), 0


def compose(*steps: object) -> v2.Compose:
    return v2.Compose([*steps, v2.PILToTensor()])


@pytest.mark.parametrize(
    "transform",
    [
        plain(),
        plain(9),
        crop_flip(12, 4),
        crop_flip(11, 0),
        compose(v2.RandomCrop((7, 9), padding=(1, 2, 3, 0)), v2.RandomHorizontalFlip(0.3)),
        compose(
            v2.RandomHorizontalFlip(0.7), v2.RandomCrop((12, 9)), v2.RandomHorizontalFlip(), v2.RandomHorizontalFlip(1)
        ),
        compose(v2.RandomCrop((14, 5), padding=(0, 1))),
        compose(v2.Resize((20, 20)), v2.CenterCrop(16), v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip(0)),
        v2.Compose([v2.PILToTensor(), v2.RandomHorizontalFlip(), v2.RandomCrop(10)]),
    ],
    ids=str,
)
def test_bit_equal_to_the_cpus(transform: v2.Compose) -> None:
    seeds = sample_seeds(3, 1, np.arange(2 * N))
    index = np.arange(2 * N)[::-1] % N
    keys = list(zip(index.tolist(), seeds.tolist(), strict=True))
    expected = torch.stack([image for image, *_ in SeededDataset(Noise(), transform).__getitems__(keys)])
    device_transform = DeviceTransform(transform)
    fixed = torch.stack(
        [image for image, *_ in SeededDataset(Noise(), device_transform.deterministic).__getitems__(range(N))]
    )
    height, width = fixed.shape[2:]
    border = device_transform.border
    images = torch.nn.functional.pad(fixed, [border] * 4).permute(0, 2, 3, 1).contiguous()
    windows = torch.from_numpy(device_transform.windows(seeds, height, width))
    size = device_transform.size(height, width)
    result = device_transform.crop(images, torch.from_numpy(index.copy()), windows, size)
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_random_words_are_torchs() -> None:
    seeds = np.array([0, 1, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1, *sample_seeds(0, 0, np.arange(20))])
    words = torch_random_words(seeds, 227)
    for seed, column in zip(seeds.tolist(), words.T, strict=True):
        generator = torch.Generator().manual_seed(seed)
        # 2^24 divides 2^32: a random integer below it is the low 24 bits.
        assert torch.randint(2**24, (227,), generator=generator).tolist() == (column & 0xFFFFFF).tolist()
    assert (words >> 24).max() == 255


class Mirror(v2.RandomHorizontalFlip):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (digits_train(), r"RandomAffine\("),
        (imagenet_train(), r"RandomResizedCrop\("),
        (compose(v2.RandomHorizontalFlip(), v2.RandAugment()), r"RandAugment\("),
        (compose(v2.RandomHorizontalFlip(), v2.Resize(5)), r"Resize\("),
        (compose(v2.RandomCrop(8), v2.RandomCrop(6)), r"RandomCrop\(size=\(6, 6\)"),
        (compose(v2.RandomCrop(8, padding=2, padding_mode="reflect")), r"RandomCrop\(.*padding_mode=reflect"),
        (compose(v2.RandomCrop(8, padding=2, fill=1)), r"RandomCrop\(.*fill=1"),
        (compose(v2.RandomCrop(80, pad_if_needed=True)), r"RandomCrop\(.*pad_if_needed=True"),
        (compose(Mirror()), r"Mirror\("),
        (len, "built-in function len"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_refused_by_name(transform: v2.Transform, name: str) -> None:
    with pytest.raises(
        NotCacheable, match=f"{name}.* isn't possible on the device; allowed are RandomHori.*=crop_flip"
    ):
        DeviceTransform(transform)


def test_crop_larger_than_the_image() -> None:
    with pytest.raises(NotCacheable, match="RandomCrop of 32×32 is larger than the padded images, 24×24"):
        DeviceTransform(crop_flip(32, 4)).size(16, 16)
