"""Every mode and bit depth becomes 8-bit RGB by a rule, or is refused by name; files are opened in one place."""

import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bcos_train.dataset.image import UnreadableImage, read_image, to_rgb

ROOT = Path(__file__).parents[2]
#: 16 gray values, and the same with 16 bits.
GRAY = (np.arange(16, dtype=np.uint8) * 17).reshape(4, 4)
GRAY_16 = GRAY.astype(np.uint16) * 257


def write_tiff(path: Path, data: bytes, bits: int, sample_format: int = 1, photometric: int = 1) -> Path:
    """Write an uncompressed gray TIFF of 4 × 4 pixels."""
    tags = {
        256: 4, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 4, 279: len(data), 339: sample_format
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    return path


def assert_gray(image: Image.Image, expected: np.ndarray) -> None:
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_files(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GRAY_16).save(path := tmp_path / f"a.{suffix}")
    assert_gray(read_image(path), GRAY)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_arrays(order: str) -> None:
    assert_gray(to_rgb(Image.fromarray(GRAY_16.astype(order))), GRAY)


def test_gray_and_color_agree(tmp_path: Path) -> None:
    """Pillow opens 16-bit color with the high byte of each channel."""
    values = np.arange(0, 65536, 257 // 2, dtype=np.uint16)[None]
    rows = b"\0" + values.astype(">u2").repeat(3).tobytes()
    _write_png(tmp_path / "color.png", rows, values.shape[1], bits=16, color=2)
    Image.fromarray(values).save(tmp_path / "gray.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "color.png")), np.asarray(read_image(tmp_path / "gray.png")))


def _write_png(path: Path, rows: bytes, width: int, bits: int, color: int) -> None:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_white_is_zero(tmp_path: Path) -> None:
    for bits, values in ((8, GRAY), (16, GRAY_16.astype("<u2"))):
        assert_gray(read_image(write_tiff(tmp_path / "a.tif", values.tobytes(), bits, photometric=0)), 255 - GRAY)


def test_twelve_bits(tmp_path: Path) -> None:
    first, second = (GRAY.astype(np.uint16).reshape(-1, 2) // 17 * 273).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    assert_gray(read_image(write_tiff(tmp_path / "a.tif", packed.tobytes(), 12)), GRAY)


@pytest.mark.parametrize(
    ("dtype", "sample_format", "reason"),
    [
        ("<f4", 3, "mode F (floating point)"),
        ("<u4", 1, "mode I (32-bit integers)"),
        ("<i4", 2, "mode I (signed integers)"),
        ("<i2", 2, "mode I (signed integers)"),
        ("i1", 2, "mode L (signed integers)"),
    ],
)
def test_refused(dtype: str, sample_format: int, reason: str, tmp_path: Path) -> None:
    values = GRAY.astype(dtype)
    path = write_tiff(tmp_path / "a.tif", values.tobytes(), 8 * values.itemsize, sample_format)
    with pytest.raises(UnreadableImage, match=re.escape(f"cannot read the image {path}: {reason}")) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(
        UnreadableImage, match=r"a\.png: it is a Git LFS pointer, not the file itself: run `git lfs pull`"
    ):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_refused_images_in_memory(dtype: type) -> None:
    with pytest.raises(ValueError, match=r"^mode [FI] \(.*\) has no defined black and white: save it as unsigned"):
        to_rgb(Image.fromarray(GRAY.astype(dtype)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_images_are_converted_by_pillow(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    elif mode != "RGB":
        image = image.convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_white(tmp_path: Path) -> None:
    """A black drawing on a transparent background isn't all black."""
    alpha = Image.fromarray(GRAY)
    black = Image.new("L", (4, 4))
    alpha.convert("P").save(tmp_path / "palette.png", transparency=0)
    assert_gray(to_rgb(Image.merge("LA", (black, alpha))), 255 - GRAY)
    assert_gray(to_rgb(Image.merge("RGBA", (black, black, black, alpha))), 255 - GRAY)
    assert_gray(read_image(tmp_path / "palette.png"), np.where(GRAY == 0, 255, GRAY))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("values", [GRAY, GRAY_16], ids=["8 bits", "16 bits"])
def test_exif_orientation(orientation: int, values: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(path := tmp_path / "a.png", exif=exif)
    turned = {
        1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1],
        5: GRAY.T, 6: GRAY.T[:, ::-1], 7: GRAY.T[::-1, ::-1], 8: GRAY.T[::-1],
    }  # fmt: skip
    assert_gray(read_image(path), GRAY)
    upright = read_image(path, exif_orientation=True)
    assert_gray(upright, turned[orientation])
    assert_gray(to_rgb(upright, exif_orientation=True), turned[orientation])  # not twice


@pytest.mark.parametrize(("limit", "at_most"), [(100, 100), (30, 60)])
def test_too_many_pixels(limit: int, at_most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its limit on, and refuses twice as many pixels."""
    Image.new("L", (10, 12)).save(path := tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match=rf"{path}: more than {at_most} pixels, the limit of Pillow"):
            read_image(path)


@pytest.mark.parametrize("part", ["src", "scripts", "benchmarks", "train.py", "evaluate.py", "hubconf.py"])
def test_files_are_opened_in_one_place(part: str) -> None:
    paths = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py"))
    opening = re.compile(r"Image\.open\(|pil_loader|default_loader|read_image\w* = |decode_(image|jpeg|png)\b|imread\(")
    found = {path.relative_to(ROOT).as_posix() for path in paths if opening.search(path.read_text(encoding="utf-8"))}
    assert found == ({"src/bcos_train/dataset/image.py"} if part == "src" else set())
