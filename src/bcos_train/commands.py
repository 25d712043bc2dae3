"""The commands ``bcos-train`` and ``bcos-evaluate``; in a checkout also ``python train.py`` and ``evaluate.py``."""

import sys

try:
    from bcos_train import run, sharding, verification
    from bcos_train.config.cli import entry_point, overridden_keys
    from bcos_train.training.config import EvaluateConfig, PrecomputeConfig, TrainConfig
except ModuleNotFoundError as error:
    if (error.name or "").startswith("bcos_train"):
        raise
    sys.exit(f"{error.name} is not installed, which training requires: pip install 'bcos-train[train]'")

__all__ = ["evaluate", "make_shards", "precompute_teacher", "train", "verify_data"]


@entry_point(config_name="train", root=TrainConfig)
def train(config: dict[str, object]) -> int:
    """Train a network: ``bcos-train model=resnet50 dataset=imagenet``; ``--help`` lists the groups and keys."""
    return run.train(config)


@entry_point(
    config_name="evaluate", root=EvaluateConfig, check_overrides=run.check_beside_run, rebase=run.rebase_on_run
)
def evaluate(config: dict[str, object]) -> int:
    """Evaluate a network: ``bcos-evaluate run=<run folder>`` or ``model=… dataset=… weights=official|<path>``."""
    return run.evaluate(config, overridden_keys())


@entry_point(config_name="precompute_teacher", root=PrecomputeConfig)
def precompute_teacher(config: dict[str, object]) -> int:
    """Compute a teacher's maps: ``scripts/precompute_teacher.py dataset=… distillation.teacher=… out=<folder>``."""
    return run.precompute_teacher(config)


@entry_point(config_name="make_shards", root=sharding.ShardsConfig)
def make_shards(config: dict[str, object]) -> int:
    """Write a data set as shards: ``scripts/make_shards.py dataset=… [dataset.root=…] out=<folder>``."""
    return sharding.run(config)


@entry_point(config_name="verify_data", root=verification.VerifyConfig)
def verify_data(config: dict[str, object]) -> int:
    """Check a data set: ``scripts/verify_data.py dataset=… [dataset.root=…]``."""
    return verification.run(config)
