"""The matrix product of linear layers.

On a CPU torch computes it in float32 with MKL, which leaves half of the speed of processors that are not Intel's
unused, where oneDNN, which torch computes its convolutions with, does not: without this module ViT-S takes 10 % longer
for inference and explanations (AMD EPYC with AVX-512, batch 8, two cores). There is no public function for this; the
one that ``torch.compile`` uses takes tensors of any strides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.fast.kernels import has_dispatch_mode

__all__ = ["linear_transform"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_transform(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ, (*, C), (O, C) -> (*, O), as `F.linear`, but without a derivative."""
    return _onednn_linear(x, weight) if _suits_onednn(x, weight) else F.linear(x, weight)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    is_float = x.dtype == weight.dtype == torch.float32
    has_values = x.dim() > 1 and x.numel() > 0 and weight.numel() > 0
    # A mode knows the usual operations.
    return _HAS_ONEDNN and x.device.type == "cpu" and is_float and has_values and not has_dispatch_mode()


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
