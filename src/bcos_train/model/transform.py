"""Inference transform: from a PIL image to a model's input."""

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from bcos_train.augmentation import imagenet_eval, plain
from bcos_train.dataset.encoding import BcosEncoding, Standardize
from bcos_train.dataset.image import to_rgb


class InferenceTransform:
    """PIL image -> ``(C, H, W)``: ImageNet evaluation preset or no geometry, then the model's encoding.

    Args:
        resize_size: Shorter side after resizing, in pixels; ``None``: neither resize nor crop.
        crop_size: Side of the center crop in pixels.
        encoding: Encoding of RGB as the model's input.
        exif_orientation: Rotate and flip images as their EXIF tag says, as the data set did in training.
    """

    def __init__(
        self,
        resize_size: int | None,
        crop_size: int,
        encoding: BcosEncoding | Standardize,
        exif_orientation: bool = False,
    ) -> None:
        self.geometry = plain() if resize_size is None else imagenet_eval(resize_size, crop_size)
        self.encoding = encoding
        self.exif_orientation = exif_orientation

    @property
    def transforms(self) -> transforms.Compose:
        """The steps for an RGB image, with the numbers of the official presets' ``transforms``.

        It is a new object at each access: changing its list doesn't change this transform.
        """
        to_float = transforms.ConvertImageDtype(torch.float32)
        return transforms.Compose([*self.geometry.transforms, to_float, transforms.Lambda(self.encoding.encode)])

    def __call__(self, image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"the transform takes a PIL image, got {type(image).__name__}: PIL.Image.open reads a file, and "
                "torchvision.transforms.functional.to_pil_image converts a tensor (C, H, W) or an array (H, W, C)"
            )
        return self.encoding(self.geometry(to_rgb(image, self.exif_orientation))[None])[0]

    def __repr__(self) -> str:
        return f"InferenceTransform({self.geometry}, {self.encoding})"
