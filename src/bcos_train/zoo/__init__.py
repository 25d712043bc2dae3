"""The Model Zoo: the official rows and their weights, which :func:`bcos_train.create_model` takes from here."""

from functools import partial

from bcos_train.model.registry import register_weights
from bcos_train.zoo.export import load_exported
from bcos_train.zoo.records import RECORDS, ZooRecord, record
from bcos_train.zoo.timm_hook import register_in_timm
from bcos_train.zoo.weights import WeightsError, load_official, official_file

__all__ = ["RECORDS", "WeightsError", "ZooRecord", "load_exported", "load_official", "official_file", "record"]

for _name in RECORDS:
    register_weights(_name, partial(load_official, _name))
register_in_timm()
