"""The Model Zoo for ``torch.hub``: one entry point per official model.

    model = torch.hub.load("<this folder>", "resnet50", source="local", pretrained=True)

The package need not be installed. Entry points are named like ``bcos_train.list_models(pretrained=True)``;
``torch.hub.list`` and ``torch.hub.help`` only support repositories on GitHub.
"""

import sys as _sys
from pathlib import Path as _Path

_sys.path.insert(0, str(_Path(__file__).resolve().parent / "src"))

from bcos_train.integrations.torch_hub import ENTRY_POINTS as _ENTRY_POINTS

dependencies = ["torch", "torchvision"]

globals().update(_ENTRY_POINTS)
