"""Stability of explanations under small shifts and noise.

Both metrics are cosine similarities of maps, which don't depend on the units of a method.

Axes: N images, T targets per image, C channels of the model's input, c of the image, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import Method, attribution_context, check_positive_integers, image_and_encoder

__all__ = ["noise_stability", "shift_stability"]


def shift_stability(method: Method, model: nn.Module, x: Tensor, targets: Tensor, *, shift: int = 2) -> Tensor:
    """Compute the mean cosine similarity of the map and the maps of shifted images, shifted back.

    The image is shifted by ``shift`` pixels up, down, left and right, with replicate padding. The comparison covers
    the pixels that are at least ``shift`` away from the border, the same for all directions.

    Args:
        method: (model, x, targets) -> (N, T, H, W).
        model, x, targets: Arguments of the method: x (N, C, H, W), targets (N, T).
        shift: In pixels; at least 1 and less than half of the image.

    Returns:
        (N, T) in [-1, 1]; maps that are zero everywhere, or not finite somewhere, have similarity 0.

    Raises:
        ValueError: Shapes don't match or ``shift`` is out of range, or whatever the method raises.
    """
    with attribution_context(model, x, targets) as (x, targets):
        height, width = x.shape[2:]
        check_positive_integers(shift=shift)
        if 2 * shift >= min(height, width):
            raise ValueError(f"{shift=} is too large for an image of {height}x{width} pixels: less than half of it")
        padded = F.pad(x, [shift] * 4, mode="replicate")

        def interior(maps: Tensor, down: int, right: int) -> Tensor:
            return maps[..., shift + down : height - shift + down, shift + right : width - shift + right]

        original = interior(method(model, x, targets), 0, 0)
        similarities = []
        for down, right in ((-shift, 0), (shift, 0), (0, -shift), (0, shift)):
            top, left = shift - down, shift - right
            shifted = padded[:, :, top : top + height, left : left + width].contiguous()
            similarities.append(_cosine(original, interior(method(model, shifted, targets), down, right)))
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
    """Compute the mean cosine similarity of the map and the maps of noisy copies of the image.

    The noise is Gaussian and independent for each value. With six channels it is added to the image (N, 3, H, W), which
    is clamped to [0, 1] and encoded again; other inputs have no known bounds and aren't clamped. All images get the
    same noise, so that a score doesn't depend on the rest of the batch.

    Args:
        method: (model, x, targets) -> (N, T, H, W).
        model, x, targets: Arguments of the method: x (N, C, H, W), targets (N, T).
        std: Standard deviation of the noise, at least 0, in units of x.
        n_samples: Noisy copies per image.
        seed: Seeds the noise; the global random state is neither used nor changed.

    Returns:
        (N, T) in [-1, 1]; maps that are zero everywhere, or not finite somewhere, have similarity 0.

    Raises:
        ValueError: Shapes don't match, ``std`` is negative or there are no samples, or whatever the method raises.
    """
    check_positive_integers(n_samples=n_samples)
    if not std >= 0:
        raise ValueError(f"{std=} must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    with attribution_context(model, x, targets) as (x, targets):
        image, encode = image_and_encoder(x)
        original = method(model, x, targets)
        similarities = []
        for _ in range(n_samples):
            # Drawn on the CPU, so that the noise is the same on every device and in every precision.
            noisy = image + std * torch.randn(image.shape[1:], generator=generator).to(image)
            if x.shape[1] == 6:
                noisy = noisy.clamp(0, 1)
            similarities.append(_cosine(original, method(model, encode(noisy), targets)))
    return torch.stack(similarities).mean(0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of maps: (*, H, W) and (*, H, W) -> (*)."""
    a, b = (_unit_vectors(maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(-2)) for maps in (a, b))
    return (a * b).sum(-1).nan_to_num(nan=0.0).clamp(-1, 1)


def _unit_vectors(maps: Tensor) -> Tensor:
    """Normalize to length 1, or NaN without a direction. Scaled first, so that no square over- or underflows."""
    scaled = maps / maps.abs().amax(-1, keepdim=True)
    return scaled / scaled.norm(dim=-1, keepdim=True)
