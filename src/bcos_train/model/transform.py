"""Inference transform: from a PIL image to a model's input."""

from PIL import Image
from torch import Tensor

from bcos_train.augmentation import imagenet_eval, plain
from bcos_train.dataset.encoding import BcosEncoding, Standardize


class InferenceTransform:
    """PIL image -> ``(C, H, W)``: ImageNet evaluation preset or no geometry, then the model's encoding.

    Args:
        resize_size: Shorter side after resizing, in pixels; ``None``: neither resize nor crop.
        crop_size: Side of the center crop in pixels.
        encoding: Encoding of RGB as the model's input.
    """

    def __init__(self, resize_size: int | None, crop_size: int, encoding: BcosEncoding | Standardize) -> None:
        self.geometry = plain() if resize_size is None else imagenet_eval(resize_size, crop_size)
        self.encoding = encoding

    def __call__(self, image: Image.Image) -> Tensor:
        return self.encoding(self.geometry(image.convert("RGB"))[None])[0]

    def __repr__(self) -> str:
        return f"InferenceTransform({self.geometry}, {self.encoding})"
