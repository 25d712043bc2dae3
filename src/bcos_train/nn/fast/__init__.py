"""Everything that exists for speed. Without this folder the rest of the package computes the same, more slowly.

* B-cos layers and the uncentered batch norm as single autograd functions with hand-written derivatives. Of
  y = |cos(x, w)|^(B-1) ŵ·x only the input, the small map of ‖x‖ and, for B = 2, the output are saved (otherwise, and in
  float16, ŵ·x in its place); the output is saved by the next layer anyway. ‖x‖ is one reduction over the channels and a
  box filter; its derivative is the adjoint box filter and one product with x.
* `cached_weights`: what depends on the weights alone is computed once, for inference and explanations.

`dispatch` decides when all this applies. A derivative of a derivative (``create_graph=True``) goes through the
definitions.

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
