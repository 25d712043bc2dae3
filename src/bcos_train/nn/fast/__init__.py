"""Everything that exists for speed. Without this folder the rest of the package computes the same results, but slower.

* B-cos layers and the uncentered batch norm as single autograd functions with hand-written derivatives. For
  y = |cos(x, w)|^(B-1) ŵ·x they save the input, the small map of ‖x‖ and, for B = 2, the output, which the next layer
  saves anyway (for another B, and in float16, they save ŵ·x instead). ‖x‖ takes one reduction over the channels and a
  box filter; its derivative takes the adjoint box filter and one product with x.
* `cached_weights`: unit-norm weights are computed once, for inference and explanations.

`dispatch` decides when all this applies. Second derivatives (``create_graph=True``) are computed by the definitions.

Axes in this package: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q
output size.
"""

from bcos_train.nn.fast.cached_weights import cached_weights, live_weights
from bcos_train.nn.fast.dispatch import (
    batch_norm_forward,
    bcos_conv2d_forward,
    bcos_linear_forward,
    linear_forward,
    prepare_backend,
    unit_weight,
    why,
)
from bcos_train.nn.fast.moments import moments

__all__ = [
    "batch_norm_forward",
    "bcos_conv2d_forward",
    "bcos_linear_forward",
    "cached_weights",
    "linear_forward",
    "live_weights",
    "moments",
    "prepare_backend",
    "unit_weight",
    "why",
]
