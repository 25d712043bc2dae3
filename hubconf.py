"""The Model Zoo for ``torch.hub``: one entry point for each of the official names.

    model = torch.hub.load("<this folder>", "resnet50", source="local", pretrained=True)

The package needn't be installed. ``torch.hub.list`` and ``torch.hub.help`` read repositories on GitHub alone; the names
in a folder are those of ``bcos_train.list_models(pretrained=True)``.
"""

import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

from torch import nn as _nn

_sys.path.insert(0, str(_Path(__file__).resolve().parent / "src"))

from bcos_train import create_model as _create_model
from bcos_train.weights import RECORDS as _RECORDS
from bcos_train.weights import ZooRecord as _ZooRecord

dependencies = ["torch", "torchvision"]


def _entry_point(row: _ZooRecord) -> _Callable[..., _nn.Module]:
    def build(pretrained: bool = False, progress: bool = True, **options: _Any) -> _nn.Module:
        return _create_model(row.name, pretrained=pretrained, progress=progress, **options)

    build.__name__ = build.__qualname__ = row.name
    build.__doc__ = f"""{"A B-cos network" if row.is_bcos else "A baseline with standard layers"}: {row.name}.

    Published: top-1 {row.top1} %, top-5 {row.top5} % on ImageNet; {row.params:,} parameters. {row.paper}

    Args:
        pretrained: Load the official ImageNet weights, {row.file}. They are downloaded once and verified; with
            BCOS_WEIGHTS=<folder> they are taken from there.
        progress: Show that of the download.
        options: Keyword parameters of the model, such as num_classes: bcos_train.model.model_signature("{row.name}").

    Returns:
        The model in training mode. model.transform makes its input of a PIL image.

    Raises:
        ValueError: An unknown option, or weights that can't be had or don't fit.
    """
    return build


globals().update({_name: _entry_point(_row) for _name, _row in _RECORDS.items()})
