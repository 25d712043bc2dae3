"""Data sets, their encoding for B-cos models, and exact sampling.

``DataModule`` is in ``bcos_train.dataset.data_module``, the only module that needs Lightning.
"""

from bcos_train.dataset.base import Annotations, ImageDataset, ImageSource
from bcos_train.dataset.cifar10 import Cifar10
from bcos_train.dataset.coco import Coco
from bcos_train.dataset.device_cache import DeviceCache, DeviceLoader
from bcos_train.dataset.device_transform import DeviceTransform, NotCacheable
from bcos_train.dataset.digits import Digits
from bcos_train.dataset.encoding import BcosEncoding, Standardize, add_inverse, to_float
from bcos_train.dataset.folder import ImageFolder
from bcos_train.dataset.image import UnreadableImage, read_image, to_rgb
from bcos_train.dataset.imagenet import ImageNet
from bcos_train.dataset.pasted import Pasted
from bcos_train.dataset.randomness import Stream, derive_seed, epoch_order, isolated_rng, step_seed
from bcos_train.dataset.sampler import EvalBatchSampler, TrainBatchSampler
from bcos_train.dataset.seeded import ImageSizeMismatch, SeededDataset
from bcos_train.dataset.voc import Voc2007
from bcos_train.dataset.waterbirds import Waterbirds

__all__ = [
    "Annotations",
    "BcosEncoding",
    "Cifar10",
    "Coco",
    "DeviceCache",
    "DeviceLoader",
    "DeviceTransform",
    "Digits",
    "EvalBatchSampler",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageSizeMismatch",
    "ImageSource",
    "NotCacheable",
    "Pasted",
    "SeededDataset",
    "Standardize",
    "Stream",
    "TrainBatchSampler",
    "UnreadableImage",
    "Voc2007",
    "Waterbirds",
    "add_inverse",
    "derive_seed",
    "epoch_order",
    "isolated_rng",
    "read_image",
    "step_seed",
    "to_float",
    "to_rgb",
]
