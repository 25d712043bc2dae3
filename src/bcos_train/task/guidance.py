"""Classification with explanations that are moved onto annotated objects."""

import torch
from torch import Tensor, nn

from bcos_train.dataset.randomness import Stream, index_words
from bcos_train.explanation import attribution_maps
from bcos_train.guidance import LOCALIZATION_LOSSES, GuidanceOptions, class_masks, positive_classes
from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch

__all__ = ["Guidance"]


class Guidance(Task):
    """Minimize ``loss(logits, target) + weight * sum of the localization losses`` (model guidance, arXiv 2303.11932).

    One random positive class of each image is explained, f(seed, epoch, index). Images without boxes of it have
    no localization loss. The sum is one over the images of an optimizer step, in all processes and accumulated batches,
    however many these are: gradients are averaged over the parts of the batch, so each part counts ``n_parts`` times.

    Args:
        loss: ``(logits (N, K), target) -> scalar``.
        options: Localization loss, its weight and schedule.
        annotated: ``(number of training images,)`` bool, True for images whose boxes are used; ``None``: all.
        n_parts: Number of processes times number of accumulated batches.
        seed: Seeds the drawn classes.
    """

    annotated: Tensor | None

    def __init__(
        self,
        loss: nn.Module,
        options: GuidanceOptions,
        annotated: Tensor | None = None,
        n_parts: int = 1,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.loss, self.options, self.n_parts, self.seed = loss, options, n_parts, seed
        self.register_buffer("annotated", annotated, persistent=False)

    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        options = self.options
        if batch.epoch < options.start_epoch or not options.weight:
            logits = network(batch.x)
            loss = self.loss(logits, batch.target)
            return TaskOutput(loss, logits, {"loss_classification": loss.detach()})
        # Not from the generator, whose state differs between processes: the draw would depend on their number.
        words = index_words(batch.indices, self.seed, Stream.POSITIVE_CLASS, batch.epoch)
        classes = positive_classes(batch.target, words)
        masks = self._masks(batch, classes)
        explained = classes.clamp(min=0)
        logits, maps = attribution_maps(network.model, batch.x, explained, options.method, options.layer)
        is_guided = masks.any(2).any(1)
        losses = torch.where(is_guided, LOCALIZATION_LOSSES[options.loss](maps, masks), 0)
        loss, total = self.loss(logits, batch.target), losses.sum()
        logs = {
            "loss_classification": loss.detach(),
            "loss_localization": total.detach() / is_guided.sum().clamp(min=1),
        }
        return TaskOutput(loss + options.weight * self.n_parts * total, logits, logs)

    def _masks(self, batch: TrainingBatch, classes: Tensor) -> Tensor:
        """Return the masks (N, H, W) of the boxes of one class per image; all False for images without annotation."""
        boxes = (batch.extras or {}).get("boxes")
        assert isinstance(boxes, Tensor), "the data set has no boxes"
        height, width = batch.rgb.shape[2:]
        masks = class_masks(boxes, classes, height, width, self.options.box_dilation)
        return masks if self.annotated is None else masks & self.annotated[batch.indices][:, None, None]
