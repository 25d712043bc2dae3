"""Slow, obviously right references, and comparisons."""

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, int]


def assert_near(ours: Tensor, reference: Tensor, tolerance: float, what: str = "value") -> None:
    """Assert that the largest difference is within ``tolerance`` times the largest magnitude of the reference."""
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} is not {tuple(reference.shape)}"
    assert torch.isfinite(ours).all(), f"{what} is not finite"
    error = (ours.double() - reference.double()).abs().max().item()
    scale = reference.double().abs().max().item()
    assert error <= tolerance * max(scale, 1e-12), f"{what} differs by {error:.2e}, of a magnitude of {scale:.2e}"


def pair(value: Size) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def padded(x: Tensor, kernel_size: Size, padding: Size | str, dilation: Size, padding_mode: str) -> Tensor:
    """Pad the input as the convolution does."""
    (kh, kw), (dh, dw) = pair(kernel_size), pair(dilation)
    if padding == "valid":
        return x
    if isinstance(padding, str):  # "same"
        rows, columns = dh * (kh - 1), dw * (kw - 1)
        pad = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    else:
        ph, pw = pair(padding)
        pad = [pw, pw, ph, ph]
    return F.pad(x, pad, mode="constant" if padding_mode == "zeros" else padding_mode)


def slow_bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    b: float | Tensor = 2,
    max_out: int = 1,
    explain: bool = False,
) -> Tensor:
    """Unfold every patch and weight into vectors and take one product per unit and patch."""
    units, _, kh, kw = weight.shape
    x = padded(x, (kh, kw), padding, dilation, padding_mode)
    n, c, h, w = x.shape
    (sh, sw), (dh, dw) = pair(stride), pair(dilation)
    p, q = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
    patches = F.unfold(x, (kh, kw), dilation=(dh, dw), stride=(sh, sw))  # (N, C kh kw, P Q)
    patches = patches.view(n, groups, c // groups * kh * kw, p * q)
    vectors = weight.reshape(units, -1)
    vectors = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    out = []
    for o in range(units // max_out):
        group = o // (units // max_out // groups)
        patch = patches[:, group]  # (N, C/G kh kw, P Q)
        products = [torch.einsum("k,nkp->np", vectors[o * max_out + m], patch) for m in range(max_out)]
        dot = torch.stack(products).max(0).values
        norm = (patch.square().sum(1) + 1e-6).sqrt()
        out.append(slow_transform(dot, norm, b, explain))
    return torch.stack(out, dim=1).view(n, units // max_out, p, q)


def slow_transform(dot: Tensor, norm: Tensor, b: float | Tensor, explain: bool) -> Tensor:
    if not isinstance(b, Tensor) and b == 1:
        return dot
    scale = dot.abs() / norm if not isinstance(b, Tensor) and b == 2 else ((dot / norm).abs() + 1e-6) ** (b - 1)
    return dot * (scale.detach() if explain else scale)
