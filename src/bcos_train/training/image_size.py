"""Check at the start of a run that the model accepts the size of the images, which only the transforms determine."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bcos_train.config import UserError
from bcos_train.config.containers import Config
from bcos_train.dataset import BcosEncoding, ImageSizeMismatch, Standardize, UnreadableImage
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.randomness import isolated_rng
from bcos_train.explanation import evaluating

__all__ = ["check_image_size", "check_smallest_batch"]

Part = Literal["train", "eval"]

#: Number of images to load: enough to notice different sizes.
N_IMAGES = 8
#: Height and width that every model accepts unless it specifies another size.
DEFAULT_SIZE = (224, 224)


def check_image_size(
    model: nn.Module,
    data: DataModule,
    encoding: BcosEncoding | Standardize,
    config: Config,
    parts: Sequence[Part] = ("train", "eval"),
) -> None:
    """Run the model on the meta device with the size of the first images.

    Args:
        config: Config of the run, which determines the key to name in the error message.
        parts: Transforms to check.

    Raises:
        UserError: The model doesn't accept images of this size, or a transform fails.
        ImageSizeMismatch: The images differ in size.
        UnreadableImage: An image can't be read.
    """
    for part in parts:
        images = _first_images(data, part)
        height, width = images.shape[2:]
        x = encoding(images[:1]).to("meta")
        error = _forward_error(model, x)
        # A model that doesn't run on the meta device with any size isn't checked.
        if error is not None and _forward_error(model, x.new_empty((*x.shape[:2], *_supported_size(model)))) is None:
            kind = "training" if part == "train" else "validation"
            raise UserError(
                f"{_size_key(config, part)}: the {kind} images have {height}x{width} pixels, which "
                f"{config['model']['name']} doesn't accept ({error})"
            )


def check_smallest_batch(
    model: nn.Module, data: DataModule, encoding: BcosEncoding | Standardize, world_size: int
) -> None:
    """Run the model in training mode on a single image, if a batch of an epoch has no more.

    Raises:
        UserError: The model can't be trained on it: torch's batch norms refuse one value per channel.
    """
    if data.smallest_batch(world_size) > 1:
        return
    model = copy.deepcopy(model).train()  # running statistics change
    try:
        with torch.no_grad(), isolated_rng():
            model(encoding(_first_images(data, "train")[:1]))
    except ValueError as error:
        options = "" if data.drop_last else "drop_last=true, "
        raise UserError(
            f"batch_size={data.batch_size}: of {data.num_train} training images the smallest batch of an epoch has 1 "
            f"per device, on which the model can't be trained ({' '.join(str(error).split())}); use {options}another "
            "batch_size or model.norm_layer"
        ) from error


def _first_images(data: DataModule, part: Part) -> Tensor:
    samples, n = (data.train_samples, data.num_train) if part == "train" else (data.val_samples, data.num_val)
    try:
        return samples(range(min(N_IMAGES, n)))[0]
    except (ImageSizeMismatch, UnreadableImage):
        raise
    except ValueError as error:
        raise UserError(f"augmentation.{part}: {' '.join(str(error).split())}") from error


def _forward_error(model: nn.Module, x: Tensor) -> str | None:
    """Return the error message of a forward pass on the meta device, or None."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    try:
        with torch.no_grad(), evaluating(model):
            functional_call(model, tensors, (x,))
    # bcos_train's models raise a ValueError, torch's layers a RuntimeError, timm's models an AssertionError.
    except (ValueError, RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def _supported_size(model: nn.Module) -> Sequence[int]:
    # timm's models specify their size.
    return (getattr(model, "default_cfg", None) or {}).get("input_size", DEFAULT_SIZE)[-2:]


def _size_key(config: Config, part: Part) -> str:
    """Return the config key that determines the size of the images, with its value."""
    transform = config["augmentation"][part]
    for key in ("crop_size", "size"):
        if transform.get(key) is not None:
            return f"augmentation.{part}.{key}={transform[key]}"
    if "size" in config["dataset"]:
        return f"dataset.size={config['dataset']['size']}"
    return f"augmentation.{part}.size" if transform["_target_"].endswith(".plain") else f"augmentation.{part}"
