"""Build the task of model guidance from a config, and check that it fits the model and the data."""

import torch
from torch import Tensor, nn

from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.randomness import Stream, isolated_rng, permutation
from bcos_train.explanation import attribution_maps, evaluating, is_explainable
from bcos_train.guidance import GuidanceOptions
from bcos_train.task import Guidance
from bcos_train.training.config import TrainConfig

__all__ = ["GUIDANCE_METRICS", "build_guidance"]

#: Metrics that the task logs.
GUIDANCE_METRICS = ("train/loss_classification", "train/loss_localization")


def build_guidance(settings: TrainConfig, options: GuidanceOptions, model: nn.Module, data: DataModule) -> Guidance:
    """Build the task.

    Raises:
        UserError: The data set has no boxes, the model can't be explained so, or settings contradict each other.
    """
    trainer = settings.trainer
    if not data.has_boxes:
        raise UserError(f"guidance={options.loss}: {data.dataset.name} has no boxes; dataset=pasted has")
    if options.start_epoch >= trainer.max_epochs:
        raise UserError(
            f"guidance.start_epoch={options.start_epoch}: the training has trainer.max_epochs={trainer.max_epochs}"
        )
    if options.method == "bcos" and not is_explainable(model):
        raise UserError(f"guidance.method=bcos: {settings.model_name} is no B-cos network; use ixg or grad_cam")
    if options.method == "grad_cam" and options.layer == "input":
        raise UserError("guidance.layer=input: Grad-CAM explains features; use guidance.layer=final")
    with user_errors_at("guidance"), evaluating(model), isolated_rng():
        x = settings.encoding(data.train_samples([0])[0])
        attribution_maps(model, x, torch.zeros(1, dtype=torch.long), options.method, options.layer)
    annotated, n_parts = choose_annotated(data.num_train, options), trainer.world_size * data.accumulate
    return Guidance(settings.loss, options, annotated, n_parts, settings.seed)


def choose_annotated(n: int, options: GuidanceOptions) -> Tensor | None:
    """Choose the training images whose boxes are used.

    Returns:
        (n,) bool, of which the nearest number to ``annotated_fraction`` times n, at least one, is True; ``None``: all.
    """
    if options.annotated_fraction == 1:
        return None
    annotated = torch.zeros(n, dtype=torch.bool)
    order = permutation(n, options.annotated_seed, Stream.ANNOTATED)
    annotated[order[: max(1, round(options.annotated_fraction * n))]] = True
    return annotated
