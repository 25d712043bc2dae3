"""Windows of random crops against the pixels that the transforms show."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bcos_train.augmentation import crop_flip, digits_train, imagenet_eval, imagenet_train, plain
from bcos_train.dataset import Annotations, SeededDataset
from bcos_train.dataset.window import check_has_window, draw_window, whole_image_view

#: Width and height of an image whose colors are its coordinates.
WIDTH, HEIGHT = 160, 120


def coordinates() -> Image.Image:
    """Red is x and green is y, from 16 to 255; blue marks the image against black padding."""
    x = torch.linspace(16, 255, WIDTH).expand(HEIGHT, WIDTH)
    y = torch.linspace(16, 255, HEIGHT)[:, None].expand(HEIGHT, WIDTH)
    pixels = torch.stack([x, y, torch.full_like(x, 255)], -1).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def shown(pixels: torch.Tensor) -> torch.Tensor:
    """The window that the colors of an image (3, h, w) tell: fits a line through the coordinates inside."""
    inside = pixels[2] == 255
    ends = []
    for channel, size in ((0, WIDTH), (1, HEIGHT)):
        # In relative coordinates, pixel centers lie between 0.5 / size and 1 - 0.5 / size.
        values = 0.5 / size + (pixels[channel].double() - 16) / 239 * (1 - 1 / size)
        length = pixels.shape[2 - channel]
        centers = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        centers = centers.expand_as(values) if channel == 0 else centers[:, None].expand_as(values)
        design = torch.stack([torch.ones(int(inside.sum()), dtype=torch.float64), centers[inside]], 1)
        offset, slope = torch.linalg.lstsq(design, values[inside][:, None]).solution[:, 0].tolist()
        ends.append((offset, offset + slope))
    (x0, x1), (y0, y1) = ends
    return torch.tensor([x0, y0, x1, y1])


@pytest.mark.parametrize(
    "transform",
    [
        plain(),
        plain(64),
        imagenet_train(48),
        imagenet_train(48, hflip_prob=1.0, min_scale=0.5),
        crop_flip(100, padding=10),
        v2.Compose(
            [v2.Resize(60), v2.RandomCrop(40, padding=(3, 4, 5, 6)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        ),
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop(60), v2.RandomCrop((40, 30)), v2.PILToTensor()]),
    ],
)
def test_the_window_is_what_the_pixels_show(transform: v2.Compose) -> None:
    check_has_window(transform, "augmentation.train")
    image = coordinates()
    for seed in range(12):
        torch.manual_seed(seed)
        pixels = transform(image)
        after = torch.rand(1)
        torch.manual_seed(seed)
        window = draw_window(transform, WIDTH, HEIGHT)
        assert torch.equal(torch.rand(1), after), "other random numbers"
        torch.testing.assert_close(window, shown(pixels), atol=4e-3, rtol=0)


def test_identity() -> None:
    assert draw_window(plain(), 7, 5).tolist() == [0, 0, 1, 1]
    flip = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.PILToTensor()])
    assert draw_window(flip, 7, 5).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (digits_train(), "RandomAffine"),
        (imagenet_train(32, policy="ra"), "RandAugment"),
        (imagenet_train(32, policy="ta_wide"), "TrivialAugmentWide"),
        (imagenet_train(32, random_erase_prob=0.1), "RandomErasing"),
        (v2.RandomCrop(8, padding=2, padding_mode="reflect"), "padding_mode=reflect"),
        (str, "str"),
    ],
)
def test_other_steps_are_refused(transform: v2.Transform, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^augmentation.train: .*{name}"):
        check_has_window(transform, "augmentation.train")


def test_views_of_the_whole_image() -> None:
    image = coordinates()
    view = whole_image_view(imagenet_eval(64, 56))
    assert torch.equal(view(image), plain(56)(image))
    assert shown(view(image)).sub(torch.tensor([0.0, 0, 1, 1])).abs().max() < 0.01
    for unchanged in (plain(), plain(40)):
        assert repr(whole_image_view(unchanged)) == repr(unchanged)
    with pytest.raises(ValueError, match=r"^augmentation.eval: RandomHorizontalFlip has no view"):
        whole_image_view(crop_flip())


class OneBox(torch.utils.data.Dataset[tuple[Image.Image, int, Annotations]]):
    """An image with a box on its left half."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int, Annotations]:
        return coordinates(), 3, Annotations(np.array([[3, 0, 0, WIDTH // 2, HEIGHT]]))


def test_samples_with_boxes() -> None:
    transform = imagenet_train(60, min_scale=0.6)
    alone = SeededDataset(OneBox(), transform)
    samples = SeededDataset(OneBox(), transform, lookup=lambda index: {"number": torch.tensor(index)})
    for seed in range(8):
        image, label, index, extras = samples[7, seed]  # type: ignore[misc]
        expected = alone[7, seed]
        assert (label, index) == (3, 7)
        assert torch.equal(image, expected[0])
        assert torch.equal(extras["boxes"], expected[3]["boxes"])  # type: ignore[misc]
        assert extras["number"] == 7
        torch.testing.assert_close(extras["window"], shown(image), atol=5e-3, rtol=0)
        (_, x0, _, x1, _), (left, _, right, _) = extras["boxes"][0].tolist(), extras["window"].tolist()
        middle = x0 if left > right else x1
        assert middle == pytest.approx(60 * (0.5 - left) / (right - left), abs=0.51)
