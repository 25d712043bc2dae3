"""Records of the official Model Zoo: one for each of its 34 models.

The weights are those of Böhle, Singh, Fritz, Schiele: B-cos Alignment for Inherently Interpretable CNNs and Vision
Transformers, TPAMI 2024, arXiv 2306.10898, as published at https://github.com/B-cos/B-cos-v2. Accuracies and
parameter counts in millions are quoted from the table there; exact counts are those of the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from bcos_train.model import list_models, model_signature
from bcos_train.utils.suggestions import join_words, nearest

__all__ = ["RECORDS", "RELEASE", "ZooRecord", "find_record", "timm_name"]

#: URL of the release that holds all files.
RELEASE = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights"


@dataclass(frozen=True)
class ZooRecord:
    """Official weights of a model.

    Args:
        name: Model name, equal to the official entry point.
        collection: Official group of experiments: ``bcos_final``, ``bcos_final_long`` or ``vit_final``.
        experiment: The official experiment in it.
        file: Name of the weights file. It ends in the first ten digits of the file's SHA-256.
        top1, top5: Published accuracy on ImageNet's validation set, in percent.
        params_published_m: Published number of parameters, in millions.
        params: Exact number of parameters.
        n_state_dict_entries: Number of tensors in the file.
    """

    name: str
    collection: str
    experiment: str
    file: str
    top1: float
    top5: float
    params_published_m: float
    params: int
    n_state_dict_entries: int

    #: License of the official repository. Its authors add that the networks are trained on ImageNet, whose terms of
    #: access allow non-commercial use of the data only; users have to check whether this applies to them.
    license: ClassVar[str] = "Apache-2.0"
    paper: ClassVar[str] = "arXiv:2306.10898"
    #: Evaluation preset: side of the center crop in pixels, and interpolation.
    crop_size: ClassVar[int] = 224
    interpolation: ClassVar[str] = "bilinear"
    num_classes: ClassVar[int] = 1000

    @property
    def resize_size(self) -> int:
        """Evaluation preset: length of the shorter side in pixels, before the crop."""
        return 232 if self.collection == "bcos_final_long" else 256

    @property
    def url(self) -> str:
        """URL of the file."""
        return f"{RELEASE}/{self.file}"

    @property
    def sha256(self) -> str:
        """First ten digits of the file's SHA-256."""
        return self.file.removesuffix(".pth").rpartition("-")[2]

    @property
    def is_bcos(self) -> bool:
        """True for B-cos networks; the others are baselines with standard layers on standardized RGB."""
        return not self.name.startswith("standard_")


def find_record(name: str) -> ZooRecord:
    """Return the record of a model.

    Raises:
        ValueError: Unknown model, or one without official weights; the message names the nearest that has some.
    """
    if name in RECORDS:
        return RECORDS[name]
    model_signature(name)
    near = nearest(name, list_models(pretrained=True))
    verb = "has" if len(near) == 1 else "have"
    hint = f"near it, {join_words(near, 'and')} {verb}" if near else "see list_models(pretrained=True)"
    raise ValueError(f"{name} has no official weights; {hint}")


def timm_name(name: str) -> str | None:
    """Return a model's name in timm after ``import bcos_train.timm``; ``None`` if it is not registered there."""
    if name in RECORDS and not RECORDS[name].is_bcos:
        return name
    return None if name.startswith(("standard_", "timm")) else f"bcos_{name}"


# fmt: off
_ROWS = (
    # name, collection, experiment, file, top-1, top-5, published parameters in millions, exact parameters, tensors
    # Residual networks
    ZooRecord("resnet18", "bcos_final", "resnet_18",
              "resnet_18-68b4160fff.pth", 68.736, 87.43, 11.69, 11_693_120, 101),
    ZooRecord("resnet34", "bcos_final", "resnet_34",
              "resnet_34-a63425a03e.pth", 72.284, 90.052, 21.8, 21_797_568, 181),
    ZooRecord("resnet50", "bcos_final", "resnet_50",
              "resnet_50-ead259efe4.pth", 75.882, 92.528, 25.52, 25_538_880, 266),
    ZooRecord("resnet101", "bcos_final", "resnet_101",
              "resnet_101-84c3658278.pth", 76.532, 92.538, 44.5, 44_504_896, 521),
    ZooRecord("resnet152", "bcos_final", "resnet_152",
              "resnet_152-42051a77c1.pth", 76.484, 92.398, 60.13, 60_125_504, 776),
    ZooRecord("resnext50_32x4d", "bcos_final", "resnext_50_32x4d",
              "resnext_50_32x4d-57af241ab9.pth", 75.82, 91.81, 25.0, 25_003_200, 266),
    # Densely connected networks
    ZooRecord("densenet121", "bcos_final", "densenet_121",
              "densenet_121-b8daf96afb.pth", 73.612, 91.106, 7.95, 7_945_440, 605),
    ZooRecord("densenet161", "bcos_final", "densenet_161",
              "densenet_161-9e9ea51353.pth", 76.622, 92.554, 28.58, 28_584_144, 805),
    ZooRecord("densenet169", "bcos_final", "densenet_169",
              "densenet_169-7037ee0604.pth", 75.186, 91.786, 14.08, 14_078_688, 845),
    ZooRecord("densenet201", "bcos_final", "densenet_201",
              "densenet_201-00ac87066f.pth", 75.48, 91.992, 19.91, 19_907_808, 1005),
    # VGG with uncentered batch norm
    ZooRecord("vgg11_bnu", "bcos_final", "vgg_11_bnu",
              "vgg_11_bnu-34036029f0.pth", 69.31, 88.388, 132.86, 132_855_872, 43),
    # ConvNeXt with position norm, then with uncentered batch norm
    ZooRecord("convnext_tiny", "bcos_final_long", "convnext_tiny_pn",
              "convnext_tiny_pn-539b1bfb37.pth", 77.488, 93.192, 28.54, 28_543_392, 100),
    ZooRecord("convnext_base", "bcos_final_long", "convnext_base_pn",
              "convnext_base_pn-b0495852c6.pth", 79.65, 94.614, 88.47, 88_466_304, 190),
    ZooRecord("convnext_tiny_bnu", "bcos_final_long", "convnext_tiny_bnu",
              "convnext_tiny_bnu-dbd7f5ef9d.pth", 76.826, 93.09, 28.54, 28_543_392, 169),
    ZooRecord("convnext_base_bnu", "bcos_final_long", "convnext_base_bnu",
              "convnext_base_bnu-7c32a704b3.pth", 80.142, 94.834, 88.47, 88_466_304, 313),
    # Other networks trained by ConvNeXt's long recipe
    ZooRecord("densenet121_long", "bcos_final_long", "densenet_121",
              "densenet_121_long-5175461597.pth", 77.302, 93.234, 7.95, 7_945_440, 605),
    ZooRecord("resnet50_long", "bcos_final_long", "resnet_50",
              "resnet_50_long-ef38a88533.pth", 79.468, 94.452, 25.52, 25_538_880, 266),
    ZooRecord("resnet152_long", "bcos_final_long", "resnet_152",
              "resnet_152_long-0b4b434939.pth", 80.144, 94.116, 60.13, 60_125_504, 776),
    # Vision transformers on patches of 16 pixels
    ZooRecord("simple_vit_ti_patch16_224", "vit_final", "bcos_simple_vit_ti_patch16_224",
              "bcos_simple_vit_ti_patch16_224-4b0824b1c1.pth", 59.96, 81.838, 5.8, 5_800_128, 75),
    ZooRecord("simple_vit_s_patch16_224", "vit_final", "bcos_simple_vit_s_patch16_224",
              "bcos_simple_vit_s_patch16_224-75e99d1f73.pth", 69.246, 88.096, 22.28, 22_217_088, 75),
    ZooRecord("simple_vit_b_patch16_224", "vit_final", "bcos_simple_vit_b_patch16_224",
              "bcos_simple_vit_b_patch16_224-1fc4750806.pth", 74.408, 91.156, 86.9, 86_901_504, 75),
    ZooRecord("simple_vit_l_patch16_224", "vit_final", "bcos_simple_vit_l_patch16_224",
              "bcos_simple_vit_l_patch16_224-9613b2ad0a.pth", 75.06, 91.378, 178.79, 178_787_328, 87),
    # Vision transformers on a convolutional stem
    ZooRecord("vitc_ti_patch1_14", "vit_final", "bcos_vitc_ti_patch1_14",
              "bcos_vitc_ti_patch1_14-ddd6193a77.pth", 67.26, 86.774, 5.32, 5_318_712, 77),
    ZooRecord("vitc_s_patch1_14", "vit_final", "bcos_vitc_s_patch1_14",
              "bcos_vitc_s_patch1_14-cf55c88f0c.pth", 74.504, 91.288, 20.88, 20_878_704, 77),
    ZooRecord("vitc_b_patch1_14", "vit_final", "bcos_vitc_b_patch1_14",
              "bcos_vitc_b_patch1_14-a13c46397b.pth", 77.152, 92.926, 81.37, 81_326_016, 81),
    ZooRecord("vitc_l_patch1_14", "vit_final", "bcos_vitc_l_patch1_14",
              "bcos_vitc_l_patch1_14-8739e18b8d.pth", 77.782, 92.966, 167.44, 167_444_160, 93),
    # The same transformers without B-cos layers: the baselines
    ZooRecord("standard_simple_vit_ti_patch16_224", "vit_final", "simple_vit_ti_patch16_224",
              "standard_simple_vit_ti_patch16_224-2ae8c65a39.pth", 70.23, 89.38, 5.67, 5_670_184, 126),
    ZooRecord("standard_simple_vit_s_patch16_224", "vit_final", "simple_vit_s_patch16_224",
              "standard_simple_vit_s_patch16_224-f2934fcdcf.pth", 74.47, 91.226, 21.96, 21_956_200, 126),
    ZooRecord("standard_simple_vit_b_patch16_224", "vit_final", "simple_vit_b_patch16_224",
              "standard_simple_vit_b_patch16_224-87074200ed.pth", 75.3, 91.026, 86.38, 86_378_728, 126),
    ZooRecord("standard_simple_vit_l_patch16_224", "vit_final", "simple_vit_l_patch16_224",
              "standard_simple_vit_l_patch16_224-62dc536e03.pth", 75.71, 90.05, 178.1, 178_104_296, 146),
    ZooRecord("standard_vitc_ti_patch1_14", "vit_final", "vitc_ti_patch1_14",
              "standard_vitc_ti_patch1_14-a5d6bded37.pth", 72.59, 90.788, 5.33, 5_334_952, 132),
    ZooRecord("standard_vitc_s_patch1_14", "vit_final", "vitc_s_patch1_14",
              "standard_vitc_s_patch1_14-34ecd7288e.pth", 75.756, 91.994, 20.91, 20_910_184, 132),
    ZooRecord("standard_vitc_b_patch1_14", "vit_final", "vitc_b_patch1_14",
              "standard_vitc_b_patch1_14-4d374b0220.pth", 76.79, 92.024, 81.39, 81_388_648, 140),
    ZooRecord("standard_vitc_l_patch1_14", "vit_final", "vitc_l_patch1_14",
              "standard_vitc_l_patch1_14-560e48f246.pth", 77.866, 92.298, 167.54, 167_541_352, 160),
)
# fmt: on

#: Records by model name, in the order of the official table.
RECORDS: Mapping[str, ZooRecord] = MappingProxyType({row.name: row for row in _ROWS})
