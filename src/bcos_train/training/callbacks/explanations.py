"""Explanation quality beside accuracy: while training, and of the validation that an evaluation runs."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from bcos_train.config import user_errors_at
from bcos_train.dataset import isolated_rng
from bcos_train.dataset.batch import Batch
from bcos_train.dataset.data_module import DataModule
from bcos_train.evaluation import ExplanationOptions, Predictions, Results, Subject, measure
from bcos_train.evaluation.report import evaluate_explanations
from bcos_train.evaluation.store import write_json
from bcos_train.explanation import evaluating, explain, is_explainable
from bcos_train.loading import LoadedClassifier, pad_class_names
from bcos_train.metric import GridPointing
from bcos_train.report import gallery, save_gallery
from bcos_train.runs.layout import EVALUATION
from bcos_train.training.callbacks.metrics import log_now
from bcos_train.training.distributed import is_distributed
from bcos_train.training.module import Classifier


def draw_gallery(
    module: Classifier, model: nn.Module, images: Tensor, labels: Tensor, data: DataModule, **headline: Any
) -> Figure:
    """The gallery of uint8 ``images`` (N, 3, H, W) as ``model`` explains its predictions."""
    x = module.encode(images)
    result = explain(model, x)
    probabilities = module.probabilities(result.logits)
    names = pad_class_names(data.class_names, result.logits.shape[1])
    return gallery(x, result, labels, names, probabilities=probabilities, max_samples=len(x), **headline)


def make_subject(
    module: Classifier, data: DataModule, name: str, n_images: int, predictions: Predictions | None
) -> Subject:
    """Return the module's classifier and the validation images of ``data``."""
    names = pad_class_names(data.class_names, int(getattr(module.model, "num_classes", data.num_classes)))
    classifier = LoadedClassifier(module.model, name, names, data.dataset.name, encoding=module.encode)
    return Subject(
        classifier, lambda indices: data.val_samples(indices)[0], data.fixed_val_indices(n_images), predictions
    )


def logged_metrics(results: Results) -> dict[str, float]:
    """The numbers of a measurement under the names that they are logged by.

    The first method that a metric was measured for has the metric's own name; others follow as
    ``<metric>/<method>``. The grid pointing game adds its percentiles and the number of its grids; with no grid to
    play on, its scores are NaN.
    """
    found: dict[str, float] = {}
    for metric, scores in results.scores.items():
        for i, (method, values) in enumerate(scores.items()):
            found[f"explanation/{metric}" if i == 0 else f"explanation/{metric}/{method}"] = values.mean().item()
        if metric == "grid_pointing" and scores:
            numbers = GridPointing(next(iter(scores.values()))).summary()
            for key in ("p25", "p50", "p75", "p100"):
                found[f"explanation/{metric}/{key}"] = numbers[key]
    if results.grids is not None:
        found["explanation/grid_pointing/n_grids"] = len(results.grids)
        if not len(results.grids):
            found["explanation/grid_pointing"] = math.nan
    if results.alignment:
        found["explanation/alignment"] = sum(results.alignment.values()) / len(results.alignment)
        found |= {f"explanation/alignment/{layer}": value for layer, value in results.alignment.items()}
    return found


class PredictionRecorder(pl.Callback):
    """Keeps what a validation predicts for each image, at no further cost: which images can make up grids.

    All processes take part, and all have the predictions of all images afterwards.
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
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Classifier)
        logits = outputs["logits"].float()
        predictions = logits.argmax(1)
        probabilities = pl_module.probabilities(logits)
        confidences = probabilities.gather(1, predictions[:, None])[:, 0]
        self._parts.append((batch.indices, batch.labels, predictions, confidences))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        if is_distributed():
            columns = [torch.cat(gather_all_tensors(column)) for column in columns]
        indices, *columns = (column.cpu() for column in columns)
        order = indices.argsort()
        self._parts, self.predictions = [], Predictions(*(column[order] for column in columns))


class ExplanationCallback(PredictionRecorder):
    """After an epoch, on rank 0: metrics to the loggers, a gallery into ``folder`` and to the loggers.

    The images are the same in every run on a data set; those of the grids are the ones that the validation just found
    to be classified best. Training isn't touched: the model is in evaluation mode, and the random generators are put
    back.
    """

    def __init__(self, options: ExplanationOptions, folder: Path, title: str) -> None:
        super().__init__()
        self.options, self.folder, self.title = options, folder, title
        self._samples: tuple[Tensor, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        predictions, self.predictions = self.predictions, None  # the next epoch's are others
        epoch = trainer.current_epoch + 1
        is_due = epoch % self.options.every_n_epochs == 0 or epoch == trainer.max_epochs
        if not is_due or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Classifier)
        with evaluating(pl_module.model), isolated_rng():
            if self.options.methods and self.options.metrics:
                self._measure(trainer, pl_module, predictions)
            if self.options.gallery_images and is_explainable(pl_module.model):
                self._draw(trainer, pl_module, epoch)

    def _measure(self, trainer: pl.Trainer, module: Classifier, predictions: Predictions | None) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        subject = make_subject(module, data, self.title, self.options.n_images, predictions)
        if metrics := logged_metrics(measure(subject, self.options)):
            log_now(module, metrics)

    def _draw(self, trainer: pl.Trainer, module: Classifier, epoch: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._samples is None:
            self._samples = data.fixed_val_samples(self.options.gallery_images)
        images, labels = (tensor.to(module.device) for tensor in self._samples)
        accuracy = trainer.callback_metrics.get("val/acc1")
        headline = {
            "run_name": self.title,
            "epoch": epoch,
            "accuracy": None if accuracy is None else float(accuracy) / 100,
        }
        figure = draw_gallery(module, module.model, images, labels, data, **headline)
        path = self.folder / f"epoch-{epoch:04d}.png"
        save_gallery(path, figure)
        self._send(trainer, figure, path)

    @staticmethod
    def _send(trainer: pl.Trainer, figure: Figure, path: Path) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("explanation/gallery", [str(path)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("explanation/gallery", figure, trainer.global_step, close=False)


class ExplanationReport(PredictionRecorder):
    """For an evaluation: joins the trainer's callbacks, and reports once the validation has ended."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        trainer.callbacks.append(self)  # type: ignore[attr-defined]
        self.device = trainer.strategy.root_device

    def write(
        self,
        module: Classifier,
        data: DataModule,
        options: ExplanationOptions | None,
        origin: Mapping[str, Any],
        config: Mapping[str, Any],
        output: Path,
    ) -> None:
        """Measure what the options ask for, on rank 0; see :func:`~bcos_train.evaluation.report.evaluate_explanations`.

        Args:
            origin: What is evaluated: goes into ``explanations.json``.
            config: Of the evaluation.
            output: Folder of the results.
        """
        if options is None or not options.methods or not options.metrics:
            return
        module.to(self.device)  # a trainer leaves it on the CPU
        with user_errors_at("explanation"):
            results = evaluate_explanations(
                make_subject(module, data, origin["model"], options.n_images, self.predictions),
                options,
                output,
                title=f"{origin['model']} on {data.dataset.name}",
                origin={**origin, "dataset": data.dataset.name},
                # Where the images are kept changes no score.
                identity={key: config[key] for key in IDENTITY}
                | {"dataset": {key: value for key, value in config["dataset"].items() if key != "cache"}},
            )
        # Beside accuracy, under the names that they have in training.
        numbers = logged_metrics(results)
        numbers = {key: value for key, value in numbers.items() if key.count("/") == 1 and math.isfinite(value)}
        path = output / EVALUATION
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **numbers})


#: Written by :func:`bcos_train.training.finish.report_evaluation`.
#: Config keys that scores of explanations depend on, besides the weights and the settings of the metrics.
IDENTITY = ("model", "dataset", "augmentation", "encoding", "limit_val")
#: Settings of the config group `explanation` that a data set chooses, since they depend on the size of its images.
OF_THE_DATASET = (("grid_pointing", "n"), ("grid_pointing", "smooth"), ("perturbation", "block"))


def restore_dataset_settings(
    config: Mapping[str, Any], of_the_run: Mapping[str, Any], given: Sequence[str]
) -> dict[str, Any]:
    """With ``explanation=…`` for a run, what the run's data set chose in that group stays.

    The group was composed with the command line's data set, which is another one if only ``run=…`` is given. What the
    command line sets by itself, or with a data set of its own, isn't touched.

    Args:
        config: The run's, with what the command line says laid over it.
        of_the_run: The run's own.
        given: Keys and groups on the command line.
    """
    result = copy.deepcopy(dict(config))
    for part, key in OF_THE_DATASET:
        chosen = ((of_the_run.get("explanation") or {}).get(part) or {}).get(key)
        if "explanation" in given and not {"dataset", f"explanation.{part}.{key}"} & {*given} and chosen is not None:
            result["explanation"][part][key] = chosen
    return result
