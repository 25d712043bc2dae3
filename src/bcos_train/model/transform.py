"""From an image file to a model's input, for inference."""

from typing import Any

from PIL import Image
from torch import Tensor

from bcos_train.augmentation import imagenet_eval, plain
from bcos_train.dataset.encoding import BcosEncoding, Standardize


class InferenceTransform:
    """PIL image -> ``(C, H, W)``: the ImageNet evaluation preset, or the image as it is, then the model's encoding.

    Args:
        resize_size: Length of the shorter side in pixels; ``None`` keeps the image's size and crops nothing.
        crop_size: Side of the square that is cut out of the centre.
        encoding: RGB to the model's input.
    """

    def __init__(self, resize_size: int | None, crop_size: int, encoding: BcosEncoding | Standardize) -> None:
        self.geometry: Any = plain() if resize_size is None else imagenet_eval(resize_size, crop_size)
        self.encoding = encoding

    def __call__(self, image: Image.Image) -> Tensor:
        return self.encoding(self.geometry(image.convert("RGB"))[None])[0]

    def __repr__(self) -> str:
        return f"InferenceTransform({self.geometry}, {self.encoding})"
