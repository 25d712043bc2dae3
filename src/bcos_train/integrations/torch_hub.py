"""Entry points for ``torch.hub``, one per official model; ``hubconf.py`` exposes them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bcos_train.model import create_model
from bcos_train.weights import RECORDS, ZooRecord

__all__ = ["ENTRY_POINTS"]


def _entry_point(record: ZooRecord) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, progress: bool = True, **options: Any) -> nn.Module:
        return create_model(record.name, pretrained=pretrained, progress=progress, **options)

    build.__name__ = build.__qualname__ = record.name
    build.__doc__ = f"""{"A B-cos network" if record.is_bcos else "A baseline with standard layers"}: {record.name}.

    Published: top-1 {record.top1} %, top-5 {record.top5} % on ImageNet; {record.params:,} parameters. {record.paper}

    Args:
        pretrained: Load the official ImageNet weights, {record.file}. They are downloaded once and verified; with
            BCOS_WEIGHTS=<folder> they are read from that folder.
        progress: Show a download progress bar.
        options: Keyword parameters of the model, such as num_classes; see
            bcos_train.model.model_signature("{record.name}").

    Returns:
        The model in training mode. model.transform converts a PIL image to its input.

    Raises:
        ValueError: Unknown option, or weights that are unavailable or don't fit.
    """
    return build


#: Entry points by model name.
ENTRY_POINTS = {name: _entry_point(record) for name, record in RECORDS.items()}
