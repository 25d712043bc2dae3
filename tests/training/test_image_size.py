"""Images that the model can't take are told before anything is written, with the key to change."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bcos_train import create_model
from bcos_train.config import UserError
from bcos_train.dataset import BcosEncoding
from bcos_train.run import evaluate, train
from bcos_train.training.image_size import check_image_size

from .runs import TINY, compose
from .toys import make_data

VIT = "model=simple_vit_ti_patch16_224"
PATCHES = "height and width must be multiples of 16, the side of a patch"
MISTAKES = {
    "training": (
        [VIT, "augmentation=imagenet", "augmentation.train.crop_size=100"],
        f"augmentation.train.crop_size=100: the training images have 100x100 pixels, which simple_vit_ti_patch16_224 "
        f"doesn't accept (got images of 100x100 pixels: {PATCHES}",
    ),
    "evaluation": (
        [VIT, "augmentation=imagenet", "augmentation.eval.crop_size=40"],
        "augmentation.eval.crop_size=40: the validation images have 40x40 pixels, which simple_vit_ti_patch16_224 ",
    ),
    "data set": (
        ["model=vgg11", "dataset.size=16"],
        "dataset.size=16: the training images have 16x16 pixels, which vgg11 doesn't accept (an image of 16x16 is too "
        "small: BcosVGG takes at least 32x32)",
    ),
    "option of a transform": (
        ["model=convnext_atto", "augmentation=crop_flip", "augmentation.train.size=24"],
        "augmentation.train.size=24: the training images have 24x24 pixels, which convnext_atto doesn't accept (an",
    ),
    "standard": (
        ["model=standard_vgg11", "dataset.size=24"],
        "dataset.size=24: the training images have 24x24 pixels, which standard_vgg11 doesn't accept (an image "
        "of 24x24 is too small: VGG takes at least 32x32)",
    ),
    "timm": (
        ["model=timm", "model.name=vit_tiny_patch16_224"],
        "dataset.size=32: the training images have 32x32 pixels, which vit_tiny_patch16_224 doesn't accept (Input",
    ),
    "transform": (
        ["model=resnet20", "augmentation=crop_flip", "augmentation.train.padding=0", "augmentation.train.size=48"],
        "augmentation.train: Required crop size (48, 48) is larger than input image size (32, 32)",
    ),
}
SMALL = ("limit_train=8", "limit_val=8", "batch_size=4", "trainer.max_epochs=1", "trainer.accelerator=cpu")


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_line_and_no_run_folder(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(compose(tmp_path, *SMALL, "explanation=none", *overrides))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_alone(tmp_path: Path) -> None:
    """The size of the training images is of no concern."""
    torch.save(create_model("convnext_atto", num_classes=10).state_dict(), tmp_path / "weights.pth")
    overrides = (
        *("model=convnext_atto", f"weights={tmp_path}/weights.pth", f"output={tmp_path}/out", *SMALL),
        *("explanation=none", "augmentation=crop_flip", "augmentation.train.size=24"),
    )
    assert evaluate(compose(tmp_path, *overrides, name="evaluate")) == 0
    with pytest.raises(UserError, match=r"^dataset.size=16: the validation images have 16x16 pixels, which convnext_"):
        evaluate(compose(tmp_path, *overrides, "dataset.size=16", name="evaluate"))


def write_images(folder: Path, n: int) -> None:
    """``n`` images of 32 px a part, and a larger one after them."""
    for part in ("train", "val"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (32, 32)).save(folder / part / "ab"[i % 2] / f"{i:02}.png")
        Image.new("RGB", (40, 32)).save(folder / part / "b" / "z.png")


@pytest.mark.parametrize(("n", "workers"), [(6, 0), (16, 0), (16, 2)], ids=["at once", "late", "late, by workers"])
def test_images_of_several_sizes(n: int, workers: int, tmp_path: Path) -> None:
    write_images(tmp_path / "images", n)
    own = ("dataset=imagefolder", f"dataset.root={tmp_path}/images", "augmentation=plain", f"num_workers={workers}")
    options = ("batch_size=32", "trainer.max_epochs=1", "trainer.accelerator=cpu", "explanation=none")
    with pytest.raises(UserError) as caught:
        train(compose(tmp_path / "runs", "model=resnet20", *own, *options))
    assert str(caught.value).startswith("the images of a batch differ in size (32×32 and 32×40): augmentation.train ")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "runs").exists() == (n > 6), "a run folder only if training had begun"


CONFIG = {"model": {"name": "toy"}, "augmentation": {"train": {"_target_": "f"}, "eval": {}}, "dataset": {}}


class Picky(nn.Module):
    """Takes images of 224 px only; ``error``: none at all."""

    def __init__(self, error: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.norm.eval()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        assert not self.error, "a fault in the code"
        assert x.shape[2:] == (224, 224), "224 px"
        return self.dropout(self.norm(x))


def test_the_model_stays_as_it_is() -> None:
    model, state = Picky(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"^augmentation.train: the training images have 8x8 pixels, which toy doesn't "
    ):
        check_image_size(model, make_data(), BcosEncoding(), CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)


def test_a_fault_of_the_model_is_no_mistake_of_the_user() -> None:
    """It shows, with its traceback, where it happens."""
    check_image_size(Picky(error=True), make_data(), BcosEncoding(), CONFIG)


def test_the_smallest_images_that_a_model_takes(tmp_path: Path) -> None:
    assert train(compose(tmp_path, *TINY, "dataset.size=8", "limit_train=8", "limit_val=8")) == 0
