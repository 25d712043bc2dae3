"""The official vision transformers that the project's are compared with."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from bcos.experiments.utils import Experiment
from official_models import perturb_
from torch import Tensor, nn

from bcos_train import create_model

#: Parameters and state dict entries of the published weights (the files themselves).
PUBLISHED = {
    "simple_vit_ti_patch16_224": (5_800_128, 75),
    "simple_vit_s_patch16_224": (22_217_088, 75),
    "simple_vit_b_patch16_224": (86_901_504, 75),
    "simple_vit_l_patch16_224": (178_787_328, 87),
    "vitc_ti_patch1_14": (5_318_712, 77),
    "vitc_s_patch1_14": (20_878_704, 77),
    "vitc_b_patch1_14": (81_326_016, 81),
    "vitc_l_patch1_14": (167_444_160, 93),
    "standard_simple_vit_ti_patch16_224": (5_670_184, 126),
    "standard_simple_vit_s_patch16_224": (21_956_200, 126),
    "standard_simple_vit_b_patch16_224": (86_378_728, 126),
    "standard_simple_vit_l_patch16_224": (178_104_296, 146),
    "standard_vitc_ti_patch1_14": (5_334_952, 132),
    "standard_vitc_s_patch1_14": (20_910_184, 132),
    "standard_vitc_b_patch1_14": (81_388_648, 140),
    "standard_vitc_l_patch1_14": (167_541_352, 160),
}


def is_standard(name: str) -> bool:
    return name.startswith("standard_")


def build_official(name: str, **options: Any) -> Any:
    """The model of the official experiment; options under our names, as far as the official code has them."""
    args = {theirs: options[ours] for ours, theirs in OFFICIAL_NAMES.items() if ours in options}
    parts: dict[str, Any] = {"args": args}
    if bcos_args := {key: options[key] for key in ("b", "max_out") if key in options}:
        parts["bcos_args"] = bcos_args
    if "logit_bias" in options:
        parts["logit_bias"] = options["logit_bias"]
    experiment = name.removeprefix("standard_") if is_standard(name) else f"bcos_{name}"
    with warnings.catch_warnings():
        # It misses its own entry point among the callers, which does the same.
        warnings.filterwarnings("ignore", message="You are trying to use the entrypoints")
        return Experiment("ImageNet", "vit_final", experiment).get_model(**parts)


OFFICIAL_NAMES = {"num_classes": "num_classes", "in_chans": "channels"}


@dataclass
class Pair:
    name: str
    ours: Any
    official: Any
    #: Keys whose values were not the same in both as built.
    differences: list[str] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> "Pair":
        self.ours.to(dtype)
        self.official.to(dtype)
        return self


def build_pair(name: str, seed: int = 0, **options: Any) -> Pair:
    """Both models, each built after setting the same seed."""
    torch.manual_seed(seed)
    official = build_official(name, **options)
    torch.manual_seed(seed)
    return Pair(name, create_model(name, **options), official)


def share_state(pair: Pair) -> Pair:
    """Ours perturbed, then loaded into the official model and back; both in evaluation mode."""
    perturb_(pair.ours)
    pair.official.load_state_dict(pair.ours.state_dict(), strict=True)
    pair.ours.load_state_dict(pair.official.state_dict(), strict=True)
    pair.ours.eval()
    pair.official.eval()
    return pair


def official_weights(model: nn.Module, x: Tensor, target: int, create_graph: bool = False) -> Tensor:
    """d logit / d x of the official model in its current mode: ``(N, C, H, W)``."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf, create_graph=create_graph)
    return grad
