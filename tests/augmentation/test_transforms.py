"""The transforms against the official presets: bit-equal where the random numbers are drawn alike."""

import os
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from bcos.data import presets as official
from PIL import Image
from torchvision.transforms import InterpolationMode, autoaugment, v2

from bcos_train.augmentation import (
    Interpolation,
    Policy,
    crop_flip,
    digits_train,
    imagenet_eval,
    imagenet_train,
    plain,
)
from bcos_train.dataset.encoding import BcosEncoding, Standardize

CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
SIZES = [(32, 32), (500, 375), (375, 500), (180, 300), (224, 224), (257, 100)]


def _image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colors with noise on top."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - x), np.sin(11 * x * y)], -1)
    return Image.fromarray(np.clip(127 + 90 * waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", get_args(Interpolation))
def test_eval_equals_official(size: tuple[int, int], mode: str) -> None:
    arguments = {"crop_size": 224, "resize_size": 232, "interpolation": InterpolationMode(mode)}
    image = _image(size)
    ours = imagenet_eval(232, 224, mode)(image)
    assert ours.dtype == torch.uint8
    assert type(ours) is torch.Tensor
    for is_bcos, encoding in ((True, BcosEncoding()), (False, Standardize())):
        theirs = official.ImageNetClassificationPresetEval(is_bcos=is_bcos, **arguments)(image)
        assert torch.equal(encoding(ours[None])[0], theirs)


@pytest.mark.skipif(
    "BCOS_TEST_DATA" not in os.environ, reason="BCOS_TEST_DATA, the folder of the real images' zips, is not set"
)
def test_eval_equals_official_on_real_photographs() -> None:
    theirs = official.ImageNetClassificationPresetEval(crop_size=224, is_bcos=True)
    ours, encoding = imagenet_eval(), BcosEncoding()
    with zipfile.ZipFile(Path(os.environ["BCOS_TEST_DATA"]) / "imagenet-sample-200.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][::20]
        assert len(names) == 10
        for name in names:
            with archive.open(name) as file:
                image = Image.open(file).convert("RGB")
            assert torch.equal(encoding(ours(image)[None])[0], theirs(image)), name


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_bcos", [True, False], ids=["bcos", "standard"])
def test_crop_flip_equals_official(seed: int, is_bcos: bool) -> None:
    theirs = official.CIFAR10ClassificationPresetTrain(is_bcos=is_bcos)
    encoding = BcosEncoding() if is_bcos else Standardize(CIFAR10_MEAN, CIFAR10_STD)
    image = _image((32, 32), seed)
    torch.manual_seed(seed)
    expected = theirs(image)
    torch.manual_seed(seed)
    assert torch.equal(encoding(crop_flip()(image)[None])[0], expected)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("erase", [0.0, 1.0], ids=["plain", "erase"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_imagenet_train_equals_official(seed: int, erase: float, mode: str) -> None:
    theirs = official.ImageNetClassificationPresetTrain(
        crop_size=64, interpolation=InterpolationMode(mode), random_erase_prob=erase, is_bcos=True
    )
    image = _image((120, 90), seed)
    torch.manual_seed(seed)
    expected = theirs(image)
    torch.manual_seed(seed)
    ours = imagenet_train(64, mode, random_erase_prob=erase)(image)
    assert torch.equal(BcosEncoding()(ours[None])[0], expected)
    assert (ours == 0).all(0).any() == (erase == 1.0)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_policies_run(policy: str) -> None:
    torch.manual_seed(0)
    transform = imagenet_train(32, policy=policy)
    for seed in range(5):
        image = transform(_image((50, 40), seed))
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def _step(transform: v2.Compose, kind: type) -> v2.Transform:
    (step,) = [step for step in transform.transforms if isinstance(step, kind)]
    return step


def _preset_step(policy: str, kind: type) -> object:
    preset = official.ImageNetClassificationPresetTrain(
        crop_size=32, auto_augment_policy=policy, ra_magnitude=7, augmix_severity=4
    )
    (step,) = [step for step in preset.transforms.transforms if isinstance(step, kind)]
    return step


@pytest.mark.parametrize(
    ("policy", "ours", "theirs", "parameters"),
    [
        (
            "ra",
            v2.RandAugment,
            autoaugment.RandAugment,
            ["num_ops", "magnitude", "num_magnitude_bins", "interpolation"],
        ),
        ("ta_wide", v2.TrivialAugmentWide, autoaugment.TrivialAugmentWide, ["num_magnitude_bins", "interpolation"]),
        (
            "augmix",
            v2.AugMix,
            autoaugment.AugMix,
            ["severity", "mixture_width", "chain_depth", "alpha", "all_ops", "interpolation"],
        ),
        *(
            (name, v2.AutoAugment, autoaugment.AutoAugment, ["policy", "interpolation", "policies"])
            for name in ("imagenet", "cifar10", "svhn")
        ),
    ],
    ids=get_args(Policy),
)
def test_policies_have_the_official_parameters(policy: str, ours: type, theirs: type, parameters: list[str]) -> None:
    mine = _step(imagenet_train(32, policy=policy, ra_magnitude=7, augmix_severity=4), ours)
    other = _preset_step(policy, theirs)
    for name in parameters:
        alias = "_policies" if name == "policies" and not hasattr(mine, name) else name
        assert getattr(mine, alias) == getattr(other, name), name


@pytest.mark.parametrize(
    ("ours", "theirs", "bins"),
    [
        (v2.RandAugment(), autoaugment.RandAugment(), 31),
        (v2.TrivialAugmentWide(), autoaugment.TrivialAugmentWide(), 31),
        (v2.AugMix(), autoaugment.AugMix(), 10),
    ],
    ids=["ra", "ta_wide", "augmix"],
)
def test_policies_have_the_official_operations(ours: v2.Transform, theirs: torch.nn.Module, bins: int) -> None:
    if isinstance(ours, v2.TrivialAugmentWide):
        reference = theirs._augmentation_space(bins)
    else:
        reference = theirs._augmentation_space(bins, (32, 32))
    space = {**ours._AUGMENTATION_SPACE}
    assert set(space) == set(reference)
    for name, (magnitudes, signed) in reference.items():
        fn, mine_signed = space[name]
        mine = fn(bins, 32, 32)
        assert mine_signed == signed, name
        if magnitudes.ndim == 0:
            assert mine is None, name
        else:
            # The newer Solarize takes its threshold as a share of the largest value.
            scale = 255 if name == "Solarize" else 1
            torch.testing.assert_close(scale * torch.as_tensor(mine, dtype=torch.float), magnitudes.float(), msg=name)


def test_plain() -> None:
    image = _image((50, 40))
    assert torch.equal(plain()(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert plain(size=20)(image).shape == (3, 20, 20)


def test_digits_train_moves_but_keeps_the_digit() -> None:
    image = Image.fromarray(np.pad(np.full((12, 12, 3), 200, np.uint8), ((10, 10), (10, 10), (0, 0))))
    transform = digits_train()
    moved = []
    for seed in range(10):
        torch.manual_seed(seed)
        moved.append(transform(image))
    assert len({tensor.numpy().tobytes() for tensor in moved}) == 10
    mass = plain()(image).float().sum()
    assert all(0.6 < tensor.float().sum() / mass < 1.4 for tensor in moved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: imagenet_train(policy="ta_wid"),
            r"unknown policy 'ta_wid'; did you mean ta_wide\? allowed: ra, ta_wide, augmix, imagenet, cifar10 or svhn",
        ),
        (lambda: imagenet_train(interpolation="cubic"), "unknown interpolation 'cubic'; did you mean bicubic"),
        (
            lambda: imagenet_eval(interpolation="xyz"),
            "unknown interpolation 'xyz'; allowed: nearest, bilinear or bicubic",
        ),
        (lambda: plain(size=8, interpolation="linear"), "did you mean bilinear"),
    ],
    ids=["policy", "train", "eval", "plain"],
)
def test_unknown_names(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_names_steps_and_values() -> None:
    text = repr(imagenet_train(176, policy="ra", ra_magnitude=7, random_erase_prob=0.1))
    for part in ("RandomResizedCrop(size=(176, 176)", "RandAugment(", "magnitude=7", "RandomErasing(p=0.1"):
        assert part in text
    assert "Resize(size=[256]" in repr(imagenet_eval())
    assert "padding=[4, 4, 4, 4]" in repr(crop_flip())
