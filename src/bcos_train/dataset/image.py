"""Read images as 8-bit RGB: the one place of the project that opens image files.

What becomes of each mode:

* 8 bits per channel (gray, palette, RGB, CMYK, …): Pillow's conversion to RGB.
* 16 bits per channel: the most significant 8 bits, as Pillow does for color. With fewer bits in a 16-bit file (12, for
  instance), the most significant 8 of those.
* Transparency: the image on white, as browsers show it. Opaque images are unchanged.
* 32-bit integers, floating point and signed integers are refused, since nothing says what white is.
* Several frames or pages: the first one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bcos_train.utils.substitutes import substitute_reason

__all__ = ["UnreadableImage", "has_format", "image_size", "is_skippable", "read_encoded", "read_image", "to_rgb"]

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TIFF_WHITE_IS_ZERO, _TIFF_SIGNED = 0, 2


class UnreadableImage(ValueError):
    """A file is not an image, is damaged, or has no defined conversion to 8-bit RGB."""


def read_image(path: str | os.PathLike[str], exif_orientation: bool = False) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Args:
        path: The file.
        exif_orientation: As for :func:`to_rgb`.

    Raises:
        UnreadableImage: There is no such file, it is not an image or damaged, it has too many pixels, or
            :func:`to_rgb` refuses it. The message is one line with the path.
    """
    with _opened(path) as image:
        return to_rgb(image, exif_orientation)


def read_encoded(content: bytes, name: str, formats: tuple[str, ...], exif_orientation: bool = False) -> Image.Image:
    """Read an image from the content of a file as 8-bit RGB.

    Args:
        content: That of an image file.
        name: What the message of an error calls it.
        formats: Pillow's names of the formats that may be decoded.
        exif_orientation: As for :func:`to_rgb`.

    Raises:
        UnreadableImage: As for :func:`read_image`.
    """
    with _opened(content, name, formats) as image:
        return to_rgb(image, exif_orientation)


def has_format(path: str | os.PathLike[str], formats: tuple[str, ...]) -> bool:
    """True if an image file has one of these formats (Pillow's names), whatever its name says.

    Raises:
        UnreadableImage: There is no such file, or it is not an image. The message is one line with the path.
    """
    with _opened(path) as image:
        return image.format in formats


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the width and height of an image file from its header.

    Raises:
        UnreadableImage: There is no such file, or it is not an image. The message is one line with the path.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(
    source: str | os.PathLike[str] | bytes, name: str | None = None, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open an image file, or its content; whatever goes wrong in the block is an :class:`UnreadableImage`.

    Args:
        name: What the message calls it; ``None``: its path.
        formats: Those that may be opened; ``None``: all.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            yield image
    # For a damaged file Pillow raises nearly anything, depending on the format.
    except Exception as error:
        name = name or os.fsdecode(source)
        raise UnreadableImage(f"cannot read the image {name}: {_reason(error, source)}") from error


def is_skippable(error: UnreadableImage) -> bool:
    """True if the image itself is the cause; False if memory, network or permissions are, which may be better later."""
    cause = error.__cause__
    return not isinstance(cause, MemoryError) and getattr(cause, "errno", None) in (None, errno.ENOENT)


def to_rgb(image: Image.Image, exif_orientation: bool = False) -> Image.Image:
    """Convert an image to 8-bit RGB by the rules of this module.

    Args:
        image: In any mode.
        exif_orientation: Rotate and flip the image as its EXIF tag says. False, the convention of torchvision, timm and
            the official code, keeps the pixels as they are stored. (The orientation of a TIFF is always applied, by
            Pillow.)

    Raises:
        ValueError: The mode has no defined conversion.
    """
    source = image
    # Pillow decodes lazily, and some modes and tags are only final after that.
    image.load()
    if exif_orientation:
        image = ImageOps.exif_transpose(image)
    tiff_tags = getattr(source, "tag_v2", {})
    if image.mode == "F":
        raise ValueError(_refusal(image, "floating point"))
    if _TIFF_SIGNED in np.atleast_1d(tiff_tags.get(_TIFF_SAMPLE_FORMAT, ())):
        raise ValueError(_refusal(image, "signed integers"))
    # Pillow opens 16-bit PGM files, and in earlier versions 16-bit PNG files, in the 32-bit mode.
    if image.mode.startswith("I;16") or (image.mode == "I" and source.format in ("PNG", "PPM")):
        bits = int(np.max(tiff_tags.get(_TIFF_BITS_PER_SAMPLE, 16)))
        gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        if tiff_tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
            gray = 255 - gray
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "I":
        raise ValueError(_refusal(image, "32-bit integers"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return rgba.convert("RGB")
    return image.convert("RGB")


def _refusal(image: Image.Image, kind: str) -> str:
    return f"mode {image.mode} ({kind}) has no defined black and white: save it as unsigned 8- or 16-bit integers"


def _reason(error: Exception, source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        pixels = (Image.MAX_IMAGE_PIXELS or 0) * (2 if isinstance(error, Image.DecompressionBombError) else 1)
        return f"more than {pixels:,} pixels, the limit of Pillow: scale it down"
    if isinstance(error, UnidentifiedImageError):
        substitute = substitute_reason(source)
        return f"it {substitute}" if substitute else "not an image, or in a format that Pillow can't read"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
