"""Compute a teacher's logits and explanation maps once for each image, see :mod:`bcos_train.distillation.store`."""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset import SeededDataset, to_float
from bcos_train.dataset.data_module import DataModule
from bcos_train.dataset.seeded import Transform
from bcos_train.dataset.subset import whole_dataset
from bcos_train.distillation import Teacher, choose_stored_explanation
from bcos_train.distillation.options import ExplanationKind
from bcos_train.distillation.store import (
    MANIFEST,
    PARTS,
    Manifest,
    Part,
    PartInfo,
    Store,
    indices_name,
    record_type,
    scale_maps,
    shard_images,
)
from bcos_train.explanation.precision import without_tf32
from bcos_train.runs.lock import locked
from bcos_train.training.build import build_trainer, choose_num_classes, keep_initial_classes, load_data
from bcos_train.training.config import PrecomputeConfig
from bcos_train.training.distillation import load_checked_teacher
from bcos_train.training.frozen import (
    N_SAMPLES,
    check_augmentation,
    describe_samples,
    one_line,
    views,
)
from bcos_train.training.label_checks import check_labels
from bcos_train.training.options import split_batch
from bcos_train.utils.atomic import atomic_write, remove_leftovers

__all__ = ["precompute"]

#: Seconds between two lines about the progress.
_REPORT_SECONDS = 10.0


def precompute(settings: PrecomputeConfig, console: Console) -> None:
    """Write the teacher's logits and maps of all training and validation images into a folder.

    What is there already is kept: an interrupted computation continues with the first missing shard.

    Raises:
        UserError: The settings are wrong, the folder holds something else, or there isn't enough space.
    """
    options = settings.distillation
    if options is None or options.teacher is None or options.frozen is not None:
        raise UserError("distillation.teacher: name the teacher whose maps to compute")
    settings = replace(settings, trainer=replace(settings.trainer, devices=1, num_nodes=1))
    check_labels(settings)
    with user_errors_at(""):
        trainer = build_trainer(settings.trainer)
        split = split_batch(settings.batch_size, 1, None)
    trainer.strategy.setup_environment()
    data = load_data(settings, split, trainer, keep_initial_classes(settings))
    pl.seed_everything(settings.seed, verbose=False)  # for a teacher with random weights
    teacher = load_checked_teacher(options, data.class_names, choose_num_classes(settings, data))
    with user_errors_at("distillation"):
        kind = choose_stored_explanation(options.explanation, teacher.model)
    try:
        check_augmentation(settings.augmentation)
    except ValueError as error:  # the maps are right, but not for this training
        console.print(f"note: this training can't use the maps: {error}", style="yellow", soft_wrap=True, markup=False)
    job = _Job(data, teacher, kind, settings, trainer.strategy.root_device, console)
    with user_errors_at(f"out={settings.out}"), locked(Path(settings.out)):
        job.run(Path(settings.out), settings.verify)


class _Job:
    """The computation of a store."""

    def __init__(
        self,
        data: DataModule,
        teacher: Teacher,
        kind: ExplanationKind,
        settings: PrecomputeConfig,
        device: torch.device,
        console: Console,
    ) -> None:
        self.data, self.teacher, self.kind, self.device, self.console = data, teacher, kind, device, console
        self.size, self.dtype, self.batch_size = settings.size, settings.dtype, settings.batch_size
        with user_errors_at(""):
            self.views = views(settings.augmentation.eval)

    def run(self, folder: Path, verify: bool) -> None:
        remove_leftovers(folder)
        manifest = self.describe()
        if (folder / MANIFEST).exists():
            recorded = Manifest.load(folder)
            _check_identity(recorded, manifest)
            manifest = recorded
        elif others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            raise ValueError(f"the folder holds other files ({others[0]}): choose an empty one")
        store = Store(folder, manifest)
        if verify:
            self._verify(store)
        missing = store.missing()
        self._announce(store, missing)
        for part in PARTS:
            with atomic_write(folder / indices_name(part)) as path:
                path.write_bytes(_indices_file(whole_dataset(self.data.images(part))[1]))
        if missing:
            manifest.save(folder)
            self._compute(store, missing)
        if missing or manifest.accuracy is None:
            store.manifest = replace(manifest, accuracy=store.accuracy())
            store.manifest.save(folder)
        self.console.print(
            f"complete: {folder}; the teacher has {store.manifest.accuracy:.2f}% of the validation images right"
        )

    def describe(self) -> Manifest:
        """Return the manifest of a store without shards."""
        parts = {part: self._describe_part(part, self.views[part]) for part in PARTS}
        return Manifest(
            teacher=self.teacher.label,
            teacher_sha256=self.teacher.sha256,
            teacher_precision=self.teacher.precision,
            explanation=self.kind,
            dataset=self.data.dataset.name,
            class_names=[str(name) for name in self.data.class_names],
            num_classes=self._first_result("val")[0].shape[1],
            dtype=self.dtype,
            parts=parts,
        )

    def _describe_part(self, part: Part, view: Transform) -> PartInfo:
        whole, indices = whole_dataset(self.data.images(part))
        positions = np.linspace(0, len(indices) - 1, min(N_SAMPLES, len(indices))).round().astype(int)
        logits, maps = self._first_result(part)
        map_shape = (maps.shape[1], maps.shape[2], maps.shape[3])
        return PartInfo(
            count=len(indices),
            view=one_line(view),
            inventory=dict(self.data.inventory[part]),  # type: ignore[arg-type]
            samples=describe_samples(whole, view, indices[positions].tolist()),
            indices_sha256=hashlib.sha256(_indices_file(indices)).hexdigest(),
            map_shape=map_shape,
            shard_images=shard_images(record_type(logits.shape[1], self.dtype, map_shape)),
        )

    def _first_result(self, part: Part) -> tuple[Tensor, Tensor]:
        image, *_ = SeededDataset(self.data.images(part), self.views[part])[0]
        return self._explain(image[None])

    def _explain(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and maps (N, C, h, w) of uint8 images (N, 3, H, W), in float32 on the CPU."""
        with without_tf32(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            logits, maps = self.teacher.explain(to_float(images.to(self.device)), self.kind)
        maps = maps.float() if maps.dim() == 4 else maps.float()[:, None]
        height, width = (min(self.size, side) for side in maps.shape[2:])
        if (height, width) != tuple(maps.shape[2:]):
            # Antialiased: each value is a mean over the pixels that it stands for.
            maps = F.interpolate(maps, (height, width), mode="bilinear", antialias=True)
        return logits.float().cpu(), scale_maps(maps).cpu()

    def _announce(self, store: Store, missing: Sequence[tuple[Part, int, str]]) -> None:
        manifest, folder = store.manifest, store.folder
        shape = "×".join(map(str, manifest.parts["train"].map_shape))
        counts = " and ".join(
            f"{manifest.parts[part].count:,} {'training' if part == 'train' else 'validation'}" for part in PARTS
        )
        files, free = sum(1 for _ in manifest.files()), shutil.disk_usage(folder).free
        needed = sum(
            manifest.record(part).itemsize * sum(map(len, manifest.parts[part].batches(number, self.batch_size)))
            for part, number, _ in missing
        )
        self.console.print(f"teacher  {manifest.teacher}", soft_wrap=True)
        self.console.print(
            f"maps     {manifest.explanation}, {shape} in {manifest.dtype}, of {counts} images of {manifest.dataset}",
            soft_wrap=True,
        )
        self.console.print(
            f"on disk  {_gigabytes(manifest.bytes)} in {files:,} shards; missing are {len(missing):,} with "
            f"{_gigabytes(needed)}, {_gigabytes(free)} are free",
            soft_wrap=True,
        )
        if needed > free:
            raise ValueError(
                f"{_gigabytes(needed)} are needed, {_gigabytes(free)} are free: choose another disk, a smaller size=… "
                "or dtype=float16"
            )

    def _verify(self, store: Store) -> None:
        """Forget the shards that are damaged, so that they are computed again."""
        damaged = []
        for name, is_damaged in store.damaged():
            if is_damaged:
                damaged.append(name)
                self.console.print(f"damaged: {store.folder / name}, will be computed again", soft_wrap=True)
        self.console.print(f"verified: {len(store.manifest.shards) - len(damaged):,} shards are intact")
        for name in damaged:
            del store.manifest.shards[name]

    def _compute(self, store: Store, missing: Sequence[tuple[Part, int, str]]) -> None:
        parts, started, reported, done = store.manifest.parts, time.monotonic(), time.monotonic(), 0
        total = sum(sum(map(len, parts[part].batches(number, self.batch_size))) for part, number, _ in missing)
        for part in PARTS:
            numbers = [number for other, number, _ in missing if other == part]
            batches = [parts[part].batches(number, self.batch_size) for number in numbers]
            loader = iter(
                self.data.view_loader(part, self.views[part], [batch for group in batches for batch in group])
            )
            for number, group in zip(numbers, batches, strict=True):
                records = []
                for _ in group:
                    batch = next(loader)
                    records.append(self._records(store.manifest, part, batch.images, batch.labels, batch.indices))
                    done += len(batch.images)
                    if (now := time.monotonic()) - reported > _REPORT_SECONDS or done == total:
                        reported, rate = now, done / (now - started)
                        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
                        self.console.print(f"{done:,} of {total:,} images, {rate:,.1f} per second, {left} left")
                store.write(part, number, np.concatenate(records))

    def _records(self, manifest: Manifest, part: Part, images: Tensor, labels: Tensor, indices: Tensor) -> np.ndarray:
        logits, maps = self._explain(images)
        records = np.empty(len(images), manifest.record(part))
        records["label"], records["logits"], records["map"] = labels.numpy(), logits.numpy(), maps.numpy()
        for name, values in (("logits", logits), ("explanation", maps)):
            if not values.isfinite().all():
                bad = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
                raise ValueError(f"the teacher's {name} of {part} image {int(indices[bad])} is not finite")
        return records


def _indices_file(indices: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, indices.astype("<i8"), allow_pickle=False)
    return buffer.getvalue()


def _check_identity(recorded: Manifest, manifest: Manifest) -> None:
    """Raise a ValueError if a folder holds something else; the message names the first difference."""
    before, now = (json.loads(json.dumps(each.identity())) for each in (recorded, manifest))
    for path, old in _leaves(before):
        new = now
        for key in path:
            new = new[key]
        if old != new:
            name = ".".join(map(str, path))
            raise ValueError(
                f"the folder holds maps with another {name}, {old!r} instead of {new!r}: choose another one"
            )


def _leaves(node: object, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    if isinstance(node, Mapping):
        return [leaf for key, value in node.items() for leaf in _leaves(value, (*path, key))]
    return [(path, node)]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
