"""The B-cos transform and the uncentred batch norm as single operations with derivatives by hand.

They compute what `BcosLayer` and `BatchNormUncentered2d` spell out, with less memory and traffic:

* Of y = |cos(x, w)|^(B-1) ŵ·x only the input, the small map of ||x|| and, for B = 2, the output are kept (otherwise,
  and in float16, ŵ·x in its place). The output is kept anyway by whatever comes next.
* ||x|| is one reduction over the channels and a box filter on what is left; its derivative is the box filter's
  adjoint and one multiplication by x.
* The uncentred batch norm takes one pass for the statistics and one for the scaling, and two for the derivative.

A derivative of the derivative (`create_graph=True`) goes through the plain operations, which are differentiable.

Axes: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q output size.
"""

from bcos_train.nn.fused.batch_norm import uncentred_batch_norm
from bcos_train.nn.fused.conv import bcos_conv2d, detached_bcos_conv2d
from bcos_train.nn.fused.geometry import Convolution, can_box
from bcos_train.nn.fused.linear import bcos_linear, detached_bcos_linear, linear

__all__ = [
    "Convolution",
    "bcos_conv2d",
    "bcos_linear",
    "can_box",
    "detached_bcos_conv2d",
    "detached_bcos_linear",
    "linear",
    "uncentred_batch_norm",
]
