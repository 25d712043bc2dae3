"""Stability: does the explanation stay as it is when the image is moved or made noisy a little?

Both are cosine similarities of maps, which don't depend on the units that a method has.

Axes: N images, T targets of each image, C channels of the model's input, c of the image, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import Method, check_counts, explaining, perturbable

__all__ = ["noise_stability", "shift_stability"]


def shift_stability(method: Method, model: nn.Module, x: Tensor, targets: Tensor, *, shift: int = 2) -> Tensor:
    """Mean cosine similarity of the map and that of the moved image, moved back.

    The image is moved by ``shift`` pixels up, down, left and right; the pixels that are missing then repeat the
    border. Compared are the pixels that are at least ``shift`` away from the border, the same for all directions.

    Args:
        method: (model, x, targets) -> (N, T, H, W).
        model, x, targets: what the method takes: x (N, C, H, W), targets (N, T).
        shift: in pixels; at least 1 and below half of the image.

    Returns:
        (N, T) in [-1, 1]; a map that is zero all over, or not finite somewhere, counts as similarity 0.

    Raises:
        ValueError: shapes that don't fit together, or such a ``shift``; what the method raises.
    """
    with explaining(model, x, targets) as (x, targets):
        height, width = x.shape[2:]
        check_counts(shift=shift)
        if 2 * shift >= min(height, width):
            raise ValueError(f"{shift=} leaves nothing of an image of {height}x{width} pixels: below half of it")
        padded = F.pad(x, [shift] * 4, mode="replicate")

        def interior(maps: Tensor, down: int, right: int) -> Tensor:
            return maps[..., shift + down : height - shift + down, shift + right : width - shift + right]

        original = interior(method(model, x, targets), 0, 0)
        similarities = []
        for down, right in ((-shift, 0), (shift, 0), (0, -shift), (0, shift)):
            top, left = shift - down, shift - right
            moved = padded[:, :, top : top + height, left : left + width].contiguous()
            similarities.append(_cosine(original, interior(method(model, moved, targets), down, right)))
    return torch.stack(similarities).mean(0)


def noise_stability(
    method: Method,
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    std: float = 0.05,
    n_samples: int = 4,
    seed: int = 0,
) -> Tensor:
    """Mean cosine similarity of the map and those of noisy copies of the image.

    The noise is Gaussian and independent for each value. For six channels it is added to the image (N, 3, H, W), which
    is clamped to [0, 1] and encoded anew; other input has no bounds that are known here and isn't clamped. All images
    get the same noise, so that a score doesn't depend on the batch that it is computed in.

    Args:
        method: (model, x, targets) -> (N, T, H, W).
        model, x, targets: what the method takes: x (N, C, H, W), targets (N, T).
        std: standard deviation of the noise, at least 0, in units of x.
        n_samples: noisy copies of each image.
        seed: of the noise; the global random state is neither used nor changed.

    Returns:
        (N, T) in [-1, 1]; a map that is zero all over, or not finite somewhere, counts as similarity 0.

    Raises:
        ValueError: shapes that don't fit together, a negative ``std`` or no samples; what the method raises.
    """
    check_counts(n_samples=n_samples)
    if not std >= 0:
        raise ValueError(f"{std=} must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    with explaining(model, x, targets) as (x, targets):
        image, encode = perturbable(x)
        original = method(model, x, targets)
        similarities = []
        for _ in range(n_samples):
            # Drawn on the CPU: the same noise on every device and in every precision.
            noisy = image + std * torch.randn(image.shape[1:], generator=generator).to(image)
            if x.shape[1] == 6:
                noisy = noisy.clamp(0, 1)
            similarities.append(_cosine(original, method(model, encode(noisy), targets)))
    return torch.stack(similarities).mean(0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """(*, H, W) twice -> (*)."""
    a, b = (_unit(maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(-2)) for maps in (a, b))
    return (a * b).sum(-1).nan_to_num(nan=0.0).clamp(-1, 1)


def _unit(maps: Tensor) -> Tensor:
    """Vectors of length 1; NaN for those without a direction. Scaled first, so that no square over- or underflows."""
    scaled = maps / maps.abs().amax(-1, keepdim=True)
    return scaled / scaled.norm(dim=-1, keepdim=True)
