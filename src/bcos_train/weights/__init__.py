"""Read, write, verify and describe weights: files, run folders, official records and download, export, model cards."""

from bcos_train.model.registry import register_weights_loader
from bcos_train.weights.build import build_with_weights
from bcos_train.weights.download import WeightsError, download_official
from bcos_train.weights.records import RECORDS, ZooRecord, find_record
from bcos_train.weights.source import WeightsSource, read_weights_source

__all__ = [
    "RECORDS",
    "WeightsError",
    "WeightsSource",
    "ZooRecord",
    "download_official",
    "find_record",
    "read_weights_source",
]

# The registry must not import this package, which lies above it; bcos_train/__init__.py imports both.
register_weights_loader(build_with_weights, tuple(RECORDS))
