"""The Model Zoo: the official rows and their weights, which :func:`bcos_train.create_model` takes from here."""

from functools import partial

from bcos_train.model.registry import register_weights
from bcos_train.weights.download import WeightsError, load_official, official_file
from bcos_train.weights.export import load_exported
from bcos_train.weights.records import RECORDS, ZooRecord, record

__all__ = ["RECORDS", "WeightsError", "ZooRecord", "load_exported", "load_official", "official_file", "record"]

for _name in RECORDS:
    register_weights(_name, partial(load_official, _name))
