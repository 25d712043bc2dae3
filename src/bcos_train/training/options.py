"""Trainer options, and the split of a global batch."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from bcos_train.utils.cores import usable_cores

Precision = Literal[32, 16, "32", "16", "bf16"]


@dataclass(frozen=True)
class TrainerOptions:
    """Options of the trainer.

    Args:
        max_epochs: Passes over the training set.
        accelerator: ``"auto"`` uses a GPU if available.
        devices: Processes per node, one per device; ``"auto"``: all GPUs, or one process on the CPU.
        num_nodes: Number of machines; more than one needs a launcher (torchrun, srun, submitit).
        precision: 32, or mixed precision with ``"bf16"`` or 16.
        gradient_clip_val: Threshold of gradient clipping; ``None``: no clipping.
        gradient_clip_algorithm: ``"agc"`` (adaptive, per unit, arXiv 2102.06171), ``"norm"`` or ``"value"``.
        max_batch_per_device: Largest batch that fits on a device; larger batches are accumulated.
        channels_last: Use the channels_last memory format for images and weights, which makes convolutions faster;
            ``None``: yes, except on Apple's GPUs.
        tf32: On CUDA, allow TF32 (10 bits) in float32 convolutions and matrix products of training: several times as
            fast with ``precision`` 32. It is never used for validation, metrics and explanations.
        compile: Compile the network of the training step with ``torch.compile``: a slow first step, faster ones from
            then on; a smaller last batch runs uncompiled. ``None``: on CUDA, if the network has at least a million
            parameters and all requirements are installed: a C++ compiler, on CUDA Triton. Compiled code is cached for
            later runs in ``TORCHINDUCTOR_CACHE_DIR``, by default a folder in ``~/.cache/bcos-train``.
        sync_batchnorm: Compute batch statistics over all processes instead of each device.
        deterministic: Use deterministic algorithms only; slower on CUDA.
        val_every_n_epochs: Epochs between validations.
        log_every_n_steps: Optimizer steps between rows of step metrics: loss, learning rate, gradient norm, throughput.
        progress: Show progress on the terminal.

    Raises:
        ValueError: A value is below its minimum.
    """

    max_epochs: int
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    precision: Precision = 32
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["agc", "norm", "value"] = "agc"
    max_batch_per_device: int | None = None
    channels_last: bool | None = None
    tf32: bool = True
    compile: bool | None = None
    sync_batchnorm: bool = False
    deterministic: bool = False
    val_every_n_epochs: int = 1
    log_every_n_steps: int = 50
    progress: bool = True

    def __post_init__(self) -> None:
        for key in ("max_epochs", "num_nodes", "val_every_n_epochs", "log_every_n_steps", "max_batch_per_device"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"trainer.{key}={value}: at least 1")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"trainer.devices={self.devices}: at least 1, or auto")
        if self.gradient_clip_val is not None and self.gradient_clip_val <= 0:
            raise ValueError(f"trainer.gradient_clip_val={self.gradient_clip_val}: more than 0, or null for none")

    @property
    def uses_cuda(self) -> bool:
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    @property
    def uses_mps(self) -> bool:
        return self.accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available()

    @property
    def processes_per_node(self) -> int:
        if isinstance(self.devices, int):
            return self.devices
        if "LOCAL_WORLD_SIZE" in os.environ:  # set by torchrun
            return int(os.environ["LOCAL_WORLD_SIZE"])
        return torch.cuda.device_count() if self.uses_cuda else 1

    @property
    def uses_channels_last(self) -> bool:
        return not self.uses_mps if self.channels_last is None else self.channels_last

    @property
    def world_size(self) -> int:
        return self.processes_per_node * self.num_nodes


@dataclass(frozen=True)
class BatchSplit:
    """Split of a global batch over processes and micro-batches: ``batch = world * accumulate * per_device``."""

    batch: int
    world: int
    accumulate: int
    per_device: int

    def __str__(self) -> str:
        if self.world == self.accumulate == 1:
            return str(self.batch)
        return f"{self.batch} = {self.world} process(es) x {self.accumulate} accumulated x {self.per_device}"


def split_batch(batch: int, world: int, max_per_device: int | None) -> BatchSplit:
    """Split a global batch with as little accumulation as possible.

    Args:
        batch: Size of the global batch.
        world: Number of processes.
        max_per_device: Largest micro-batch, or None.

    Raises:
        ValueError: The batch isn't a multiple of the number of processes.
    """
    if batch < 1:
        raise ValueError(f"batch_size={batch}: at least 1")
    if batch % world:
        below, above = batch // world * world, -(-batch // world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"batch_size={batch}, the global one, can't be split over {world} processes: try {nearest}")
    share = batch // world
    limit = share if max_per_device is None else max_per_device
    per_device = next(n for n in range(min(share, limit), 0, -1) if share % n == 0)
    return BatchSplit(batch, world, share // per_device, per_device)


def default_workers() -> int:
    """Return the number of data loading processes per process: its share of the cores minus one; 0 with two cores."""
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if share <= 2 else share - 1
