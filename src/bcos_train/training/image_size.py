"""Can the model take the images? Asked at the start, since only the transforms know how large these are."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bcos_train.config import UserError
from bcos_train.dataset import BcosEncoding, ImageSizeMismatch, Standardize, UnreadableImage
from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import evaluating

__all__ = ["check_image_size"]

Part = Literal["train", "eval"]

#: Images that are looked at: enough to meet two sizes where nothing brings all to one.
N_IMAGES = 8
#: Height and width that every model takes that doesn't say otherwise.
USUAL = (224, 224)


def check_image_size(
    model: nn.Module,
    data: DataModule,
    encoding: BcosEncoding | Standardize,
    config: Mapping[str, Any],
    parts: Sequence[Part] = ("train", "eval"),
) -> None:
    """Send the size of the first images through the model: it computes nothing and stays as it is.

    Args:
        config: Of the run, to name the key that sets the size.
        parts: Which of the two transforms are to be used.

    Raises:
        UserError: The model doesn't take images of this size, or a transform can't make anything of them.
        ImageSizeMismatch: The images differ in size.
        UnreadableImage: One of them can't be read.
    """
    for part in parts:
        images = _first_images(data, part)
        height, width = images.shape[2:]
        x = encoding(images[:1]).to("meta")
        reason = _refusal(model, x)
        # A model that can't be tried like this is left to the run itself.
        if reason is not None and _refusal(model, x.new_empty((*x.shape[:2], *_known_size(model)))) is None:
            kind = "training" if part == "train" else "validation"
            raise UserError(
                f"{_size_key(config, part)}: the {kind} images have {height}x{width} pixels, which "
                f"{config['model']['name']} doesn't take ({reason})"
            )


def _first_images(data: DataModule, part: Part) -> Tensor:
    samples, n = (data.train_samples, data.num_train) if part == "train" else (data.val_samples, data.num_val)
    try:
        return samples(range(min(N_IMAGES, n)))[0]
    except (ImageSizeMismatch, UnreadableImage):
        raise
    except ValueError as error:
        raise UserError(f"augmentation.{part}: {' '.join(str(error).split())}") from error


def _refusal(model: nn.Module, x: Tensor) -> str | None:
    """Why the model doesn't take ``x``, a tensor without values; None if it does."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    try:
        with torch.no_grad(), evaluating(model):
            functional_call(model, tensors, (x,))
    # Our models raise a ValueError, torch's layers a RuntimeError, timm's models an AssertionError.
    except (ValueError, RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def _known_size(model: nn.Module) -> Sequence[int]:
    # timm's models say it.
    return (getattr(model, "default_cfg", None) or {}).get("input_size", USUAL)[-2:]


def _size_key(config: Mapping[str, Any], part: Part) -> str:
    """The key that sets the size of the images, with its value."""
    transform = config["augmentation"][part]
    for key in ("crop_size", "size"):
        if transform.get(key) is not None:
            return f"augmentation.{part}.{key}={transform[key]}"
    if "size" in config["dataset"]:
        return f"dataset.size={config['dataset']['size']}"
    return f"augmentation.{part}.size" if transform["_target_"].endswith(".plain") else f"augmentation.{part}"
