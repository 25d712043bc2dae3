"""Explanation metrics and galleries: during training, and for the validation of an evaluation."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from bcos_train.config import user_errors_at
from bcos_train.dataset import isolated_rng
from bcos_train.dataset.batch import Batch
from bcos_train.dataset.data_module import DataModule
from bcos_train.evaluation import BOX_METRICS, ExplanationOptions, Predictions, Results, Subject, measure
from bcos_train.evaluation.report import evaluate_explanations
from bcos_train.explanation import evaluating, explain, is_explainable
from bcos_train.loading import LoadedClassifier, pad_class_names
from bcos_train.metric import GridPointing
from bcos_train.report import gallery, save_gallery
from bcos_train.runs.layout import EVALUATION, METRICS, salvage_metrics
from bcos_train.task import DistillationTask
from bcos_train.training.callbacks.distillation import draw_pair_gallery
from bcos_train.training.distributed import is_distributed
from bcos_train.training.module import Classifier
from bcos_train.training.side_matters import only_warn
from bcos_train.utils.files import write_json

#: Config keys that scores of explanations depend on, besides the weights and the options of the metrics.
IDENTITY = ("model", "dataset", "augmentation", "encoding", "limit_val")
#: Percentiles of the grid pointing game that are logged.
_PERCENTILES = ("p25", "p50", "p75", "p100")


class Origin(TypedDict):
    """Evaluated weights, as written to the result files."""

    weights: str
    ema: bool
    model: str


def draw_gallery(
    module: Classifier,
    data: DataModule,
    samples: tuple[Tensor, Tensor],
    *,
    title: str,
    epoch: int | None = None,
    accuracy: float | None = None,
) -> Figure:
    """Draw the explanations of the predictions for ``samples``; see :func:`~bcos_train.report.gallery`.

    Args:
        samples: uint8 images ``(N, 3, H, W)`` and labels ``(N,)``, or multi-hot ``(N, K)``.
    """
    images, labels = (tensor.to(module.device) for tensor in samples)
    x = module.encode(images)
    result = explain(module.model, x)
    if labels.ndim == 2:  # the prediction, if it is among the labels, otherwise the first label
        is_label = labels.gather(1, result.prediction[:, None])[:, 0] > 0
        labels = torch.where(is_label, result.prediction, labels.argmax(1))
    return gallery(
        x,
        result,
        labels,
        pad_class_names(data.class_names, result.logits.shape[1]),
        probabilities=module.probabilities(result.logits),
        title=title,
        epoch=epoch,
        accuracy=accuracy,
        max_samples=len(x),
    )


def make_subject(
    module: Classifier, data: DataModule, name: str, n_images: int, predictions: Predictions | None
) -> Subject:
    """Return the module's classifier and the validation images of ``data``."""
    names = pad_class_names(data.class_names, int(getattr(module.model, "num_classes", data.num_classes)))
    classifier = LoadedClassifier(module.model, name, names, data.dataset.name, encoding=module.encode)

    def boxes(indices: Sequence[int]) -> Tensor:
        extras = data.val_batch(indices).extras
        assert extras is not None
        return extras["boxes"]

    return Subject(
        classifier,
        lambda indices: data.val_samples(indices)[0],
        data.fixed_val_indices(n_images),
        predictions,
        boxes if data.has_boxes else None,
    )


def logged_metrics(results: Results) -> dict[str, float]:
    """Return the results as metrics to log.

    The first method is logged under the name of the metric; further methods follow as ``<metric>/<method>``. The grid
    pointing game adds its percentiles and the number of grids; its score is NaN without grids. Metrics that need boxes
    add the score of a uniform map.
    """
    metrics: dict[str, float] = {}
    for metric, scores in results.scores.items():
        for i, (method, values) in enumerate(scores.items()):
            metrics[f"explanation/{metric}" if i == 0 else f"explanation/{metric}/{method}"] = values.mean().item()
        if metric == "grid_pointing" and scores:
            summary = GridPointing(next(iter(scores.values()))).summary()
            metrics |= {f"explanation/{metric}/{key}": summary[key] for key in _PERCENTILES}
    if results.grids is not None:
        metrics["explanation/grid_pointing/n_grids"] = len(results.grids)
        if not len(results.grids):
            metrics["explanation/grid_pointing"] = math.nan
    if results.box_share is not None:
        metrics |= {
            f"explanation/{name}/uniform": results.box_share for name in BOX_METRICS if results.scores.get(name)
        }
    if results.alignment:
        metrics["explanation/alignment"] = sum(results.alignment.values()) / len(results.alignment)
        metrics |= {f"explanation/alignment/{layer}": value for layer, value in results.alignment.items()}
    return metrics


def metric_names(options: ExplanationOptions) -> list[str]:
    """Return the names under which :func:`logged_metrics` returns the results, without those of single layers."""
    names: list[str] = []
    for metric in options.metrics if options.methods else ():
        names.append(f"explanation/{metric}")
        if metric != "alignment":
            names += [f"explanation/{metric}/{method}" for method in options.methods[1:]]
        if metric == "grid_pointing":
            names += [f"explanation/{metric}/{key}" for key in (*_PERCENTILES, "n_grids")]
        if metric in BOX_METRICS:
            names.append(f"explanation/{metric}/uniform")
    return names


def _single_labels(labels: Tensor) -> Tensor:
    """Return the class of each image that has a single one, -1 for the others: (N, K) -> (N,), int64.

    The cells of a grid need a single class; no image with the label -1 is classified correctly.
    """
    is_label = labels > 0
    return torch.where(is_label.sum(1) == 1, is_label.long().argmax(1), -1)


class PredictionRecorder(pl.Callback):
    """Records the predictions of a validation, which select the images of the grids.

    Afterwards all processes have the predictions for all images.
    """

    def __init__(self) -> None:
        self.predictions: Predictions | None = None
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.predictions, self._parts = None, []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Classifier)
        assert isinstance(outputs, Mapping)
        logits = outputs["logits"].float()
        predictions = logits.argmax(1)
        probabilities = pl_module.probabilities(logits)
        confidences = probabilities.gather(1, predictions[:, None])[:, 0]
        labels = batch.labels if batch.labels.ndim == 1 else _single_labels(batch.labels)
        self._parts.append((batch.indices, labels, predictions, confidences))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        if is_distributed():
            columns = [torch.cat(gather_all_tensors(column)) for column in columns]
        indices, *columns = (column.cpu() for column in columns)
        order = indices.argsort()
        self._parts, self.predictions = [], Predictions(*(column[order] for column in columns))


class ExplanationCallback(PredictionRecorder):
    """Measures explanations after an epoch, on rank 0; :class:`GalleryCallback` draws them as a gallery in ``folder``.

    The images are the same in every run on a data set; those of the grids are the most confident correct predictions of
    the latest validation. Training is not affected: the model is in evaluation mode, and the state of the random
    generators is restored.

    Args:
        title: Headline of the gallery.
        distillation: The gallery shows the explanations that this task compares, those of teacher and student.
    """

    def __init__(
        self, options: ExplanationOptions, folder: Path, title: str, distillation: DistillationTask | None = None
    ) -> None:
        super().__init__()
        self.options, self.folder, self.title, self.distillation = options, folder, title, distillation
        self._samples: tuple[Tensor, Tensor] | None = None
        self._due_epoch: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        predictions, self.predictions = self.predictions, None  # they are outdated after this epoch
        epoch = trainer.current_epoch + 1
        if not self._is_due(trainer, epoch) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Classifier)
        self._due_epoch = epoch
        if self.options.methods and self.options.metrics:
            with only_warn("explanation metrics"), evaluating(pl_module.model), isolated_rng():
                self._measure(pl_module, predictions)

    def draw(self, trainer: pl.Trainer, module: Classifier) -> None:
        """Draw the gallery if one is due after this epoch."""
        epoch, self._due_epoch = self._due_epoch, None
        can_draw = self.distillation is not None or is_explainable(module.model)
        if epoch is not None and self.options.gallery_images and can_draw:
            with only_warn("gallery"), evaluating(module.model), isolated_rng():
                self._draw(trainer, module, epoch)

    def draw_missing(self, trainer: pl.Trainer, module: Classifier) -> None:
        """Draw the gallery of the epoch that training resumes after, if the run was killed before it was drawn."""
        epoch, steps = divmod(trainer.global_step, module.steps_per_epoch)
        is_end = trainer.is_global_zero and epoch > 0 and steps == 0
        if is_end and self._is_due(trainer, epoch) and not self._path(epoch).exists():
            self._due_epoch = epoch
            self.draw(trainer, module)

    def _is_due(self, trainer: pl.Trainer, epoch: int) -> bool:
        return epoch % self.options.every_n_epochs == 0 or epoch == trainer.max_epochs

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.png"

    def _measure(self, module: Classifier, predictions: Predictions | None) -> None:
        subject = make_subject(module, module.data, self.title, self.options.n_images, predictions)
        if metrics := logged_metrics(measure(subject, self.options)):
            module.log_now(metrics)

    def _draw(self, trainer: pl.Trainer, module: Classifier, epoch: int) -> None:
        if self._samples is None:
            self._samples = module.data.fixed_val_samples(self.options.gallery_images)
        percent: Tensor | float | None = trainer.callback_metrics.get("val/acc1")
        if percent is None and (log := self.folder.parent / METRICS).exists():  # resumed after the validation
            percent = next((row["val/acc1"] for row in salvage_metrics(log)[1][::-1] if "val/acc1" in row), None)
        accuracy = None if percent is None else float(percent) / 100
        if self.distillation is None:
            figure = draw_gallery(module, module.data, self._samples, title=self.title, epoch=epoch, accuracy=accuracy)
        else:
            figure = draw_pair_gallery(
                self.distillation, module, self._samples, title=self.title, epoch=epoch, accuracy=accuracy
            )
        path = self._path(epoch)
        save_gallery(path, figure)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("explanation/gallery", [str(path)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("explanation/gallery", figure, trainer.global_step, close=False)


class GalleryCallback(Checkpoint):
    """Draws the gallery of ``explanations`` after the checkpoint of the epoch is saved, on rank 0.

    A ``Checkpoint`` only because Lightning calls those after all other callbacks.
    """

    def __init__(self, explanations: ExplanationCallback) -> None:
        self.explanations = explanations
        self._has_started = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._has_started = True
        self.explanations.draw_missing(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not self._has_started:  # all epochs were done
            self.explanations.draw_missing(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self.explanations.draw(trainer, pl_module)


class ExplanationReport(PredictionRecorder):
    """Adds itself to the trainer of an evaluation, and measures explanations after the validation."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        trainer.callbacks.append(self)  # type: ignore[attr-defined]
        self.device = trainer.strategy.root_device

    def write(
        self,
        module: Classifier,
        data: DataModule,
        options: ExplanationOptions | None,
        origin: Origin,
        config: Mapping[str, object],
        output: Path,
    ) -> None:
        """Measure and report, on rank 0; see :func:`~bcos_train.evaluation.report.evaluate_explanations`.

        Args:
            origin: Evaluated weights, written to ``explanations.json``.
            config: Config of the evaluation.
            output: Folder of the results, with the file of :func:`bcos_train.training.finish.report_evaluation`.
        """
        if options is None or not options.methods or not options.metrics:
            return
        module.to(self.device)  # the trainer has moved it to the CPU
        identity = {key: config[key] for key in IDENTITY}
        dataset = identity["dataset"]
        assert isinstance(dataset, Mapping)
        identity["dataset"] = {key: value for key, value in dataset.items() if key != "cache"}  # changes no score
        with user_errors_at("explanation"):
            results = evaluate_explanations(
                make_subject(module, data, origin["model"], options.n_images, self.predictions),
                options,
                output,
                title=f"{origin['model']} on {data.dataset.name}",
                origin={**origin, "dataset": data.dataset.name},
                identity=identity,
            )
        # The main scores are added to the accuracy, under the names that they have during training.
        metrics = {
            key: value for key, value in logged_metrics(results).items() if key.count("/") == 1 and math.isfinite(value)
        }
        path = output / EVALUATION
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **metrics})
