"""What a run's trainer is told, and how a global batch is split."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal[32, 16, "32", "16", "bf16"]


@dataclass(frozen=True)
class TrainerOptions:
    """How training runs.

    Args:
        max_epochs: Passes over the training set.
        accelerator: ``"auto"`` takes a GPU if there is one.
        devices: Processes on each node, one a device; ``"auto"``: all GPUs, or one process on the CPU.
        num_nodes: Machines; more than one needs a launcher (torchrun, srun, submitit).
        precision: 32, or mixed precision with ``"bf16"`` or 16.
        gradient_clip_val: Bound of the clipping; ``None``: none.
        gradient_clip_algorithm: ``"agc"`` (adaptive, unit by unit, arXiv 2102.06171), ``"norm"`` or ``"value"``.
        max_batch_per_device: Largest batch that fits on a device; gradients are accumulated over what is left.
        channels_last: Memory format of images and weights, in which convolutions are faster; ``None``: on, but for
            Apple's GPUs.
        tf32: On CUDA, let float32 convolutions and matrix products of training round their factors to TF32 (10 bits):
            several times as fast with ``precision`` 32. Validation, metrics and explanations never do.
        compile: Compile the network of the training step with ``torch.compile``: slower to begin, faster from then on;
            a smaller last batch runs uncompiled. ``None``: on CUDA, if the network has at least a million parameters
            and what it takes is installed. Needs a C++ compiler, on CUDA Triton. What was compiled is kept in
            ``TORCHINDUCTOR_CACHE_DIR``, by default a folder in ``~/.cache/bcos-train``, for the next start.
        sync_batchnorm: Batch statistics over all processes rather than each device's own.
        deterministic: Deterministic algorithms throughout; slower on CUDA.
        val_every_n_epochs: Epochs between validations.
        log_every_n_steps: Optimizer steps between rows with the step's loss, rate, gradient norm and throughput.
        progress: Whether to show progress on the terminal.

    Raises:
        ValueError: A number below its minimum.
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
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has decided
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
    """A global batch over processes and accumulated micro-batches: ``batch = world * accumulate * per_device``."""

    batch: int
    world: int
    accumulate: int
    per_device: int

    def __str__(self) -> str:
        if self.world == self.accumulate == 1:
            return str(self.batch)
        return f"{self.batch} = {self.world} process(es) x {self.accumulate} accumulated x {self.per_device}"


def split_batch(batch: int, world: int, max_per_device: int | None) -> BatchSplit:
    """Split a global batch with as little accumulation as fits.

    Raises:
        ValueError: The batch isn't a multiple of the number of processes, or there is no equal split.
    """
    if batch < 1:
        raise ValueError(f"batch_size={batch}: at least 1")
    if batch % world:
        below, above = batch // world * world, -(-batch // world) * world
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"batch_size={batch} (the global one) can't be split over {world} processes: try {near}")
    share = batch // world
    limit = share if max_per_device is None else max_per_device
    per_device = next(n for n in range(min(share, limit), 0, -1) if share % n == 0)
    return BatchSplit(batch, world, share // per_device, per_device)


def default_workers() -> int:
    """Loading processes for this process: its share of the cores less one; none with two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = cores // processes
    return 0 if share <= 2 else share - 1
