"""The matrix product of linear layers.

On CPUs torch uses MKL for float32, which reaches half of the possible speed on AMD's processors. oneDNN, which torch
uses for convolutions, is faster there: without this module ViT-S takes 10 % longer for inference and explanations (AMD
EPYC with AVX-512, batch 8, two cores). There is no public function for this; the private one, which ``torch.compile``
uses, takes tensors of any strides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.fast.kernels import has_dispatch_mode

__all__ = ["linear_transform"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_transform(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weightᵀ, (*, C), (O, C) -> (*, O), like `F.linear`; it can't be differentiated."""
    if _suits_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    is_float = x.dtype == weight.dtype == torch.float32
    has_values = x.dim() > 1 and x.numel() > 0 and weight.numel() > 0
    # Dispatch modes, such as FLOP counters, know only the public operations.
    return _HAS_ONEDNN and x.device.type == "cpu" and is_float and has_values and not has_dispatch_mode()
