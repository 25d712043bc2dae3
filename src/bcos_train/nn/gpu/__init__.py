"""What runs on a GPU in place of chains of small eager operations: torch's own batch norm kernels, and Triton's.

Nothing here imports Triton before a CUDA tensor needs it; without Triton the eager operations take over.

* `device` decides which tensors take this path.
* `batch_norm` is the uncentered batch norm from torch's native kernels.
* `triton_kernels` are the kernels, `ops` the same as operations of the dispatcher, which tracers can see.
* `layer_kernels` are the passes of a B-cos layer made of them, with the eager ones where they don't apply.
"""
