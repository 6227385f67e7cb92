import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigsimclr.data.decode import UnreadableImageError, decode, decode_unless_plain, read_header

LIMIT = 10_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_return_their_pixels(kind: str) -> None:
    pixels = noise(5, 7, 3)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), kind), max_pixels=35), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_close(kind: str) -> None:
    pixels = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    found = decode(encoded(Image.fromarray(pixels), kind), max_pixels=LIMIT)
    assert found.shape == (16, 16, 3)
    assert np.abs(found.astype(int) - pixels).max() <= 6


def test_grey_is_repeated() -> None:
    grey = noise(4, 6)
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("LA")):
        found = decode(encoded(image, "PNG"), max_pixels=LIMIT)
        assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_is_black_and_white() -> None:
    bits = noise(4, 6) > 127
    found = decode(encoded(Image.fromarray(bits), "PNG"), max_pixels=LIMIT)
    assert np.array_equal(found[..., 1], bits * 255)


def test_alpha_is_dropped_and_colours_under_it_stay() -> None:
    pixels = noise(4, 6, 4)
    pixels[0, 0] = (10, 20, 30, 0)
    found = decode(encoded(Image.fromarray(pixels), "PNG"), max_pixels=LIMIT)
    assert np.array_equal(found, pixels[..., :3])


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80"])
def test_palettes_are_looked_up_without_their_transparency(
    transparency: int | bytes | None,
) -> None:
    image = Image.fromarray(noise(4, 6) // 128, "L").convert("P")
    image.putpalette([9, 8, 7, 250, 251, 252])
    options = {} if transparency is None else {"transparency": transparency}
    found = decode(encoded(image, "PNG", **options), max_pixels=LIMIT)
    table = np.array([[9, 8, 7], [250, 251, 252]])
    assert np.array_equal(found, table[noise(4, 6) // 128])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    wide = np.array([[0, 128, 129, 257], [32768, 65280, 65406, 65535]], np.uint16)
    found = decode(encoded(Image.fromarray(wide), kind), max_pixels=LIMIT)
    assert np.array_equal(found[..., 0], np.rint(wide / 257))


def test_cmyk_becomes_colour() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = decode(encoded(ink, "TIFF"), max_pixels=LIMIT)
    assert np.array_equal(found[0, 0], [255, 0, 0])


def test_rotation_in_the_metadata_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(Image.fromarray(noise(4, 8, 3)), "JPEG", exif=exif)
    assert decode(image, max_pixels=LIMIT).shape == (4, 8, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(kind: str) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert np.array_equal(decode(image, max_pixels=LIMIT)[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((2, 2), 70_000, np.int32)),
        Image.fromarray(np.zeros((2, 2), np.float32)),
        Image.new("LAB", (2, 2)),
    ],
)
def test_modes_without_an_agreed_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(UnreadableImageError, match=r"range|mode"):
        decode(encoded(image, "TIFF"), max_pixels=LIMIT)


def test_size_is_checked_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    png += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + bytes(4)
    with pytest.raises(UnreadableImageError, match=r"pixels|DecompressionBomb"):
        decode(png, max_pixels=64_000_000)
    plain = encoded(Image.new("1", (101, 100)), "PNG")
    with pytest.raises(UnreadableImageError, match=r"declares 10100 pixels \(limit 10000\)"):
        decode(plain, max_pixels=LIMIT)


def test_damage_is_one_kind_of_error() -> None:
    jpeg = encoded(Image.fromarray(noise(32, 32, 3)), "JPEG")
    damaged = [b"", b"<html></html>", jpeg[:200], bytes(100), jpeg[:30], b"%PDF-1.4"]
    for content in damaged:
        with pytest.raises(UnreadableImageError):
            decode(content, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_random_damage_never_raises_anything_else(kind: str) -> None:
    whole = encoded(Image.fromarray(noise(12, 12, 3)), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            content[place] = rng.integers(256)
        try:
            pixels = decode(bytes(content), max_pixels=LIMIT)
        except UnreadableImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3


def test_formats_beyond_the_list_are_refused(tmp_path: Path) -> None:
    for kind in ("EPS", "ICO", "TGA", "PCX"):
        image = Image.new("RGB", (4, 4))
        with pytest.raises(UnreadableImageError, match="not one of JPEG"):
            decode(encoded(image, kind), max_pixels=LIMIT)


def test_arrays_pass_through_or_are_refused() -> None:
    pixels = noise(3, 4, 3)
    assert decode(pixels, max_pixels=LIMIT) is pixels
    with pytest.raises(UnreadableImageError, match="is not"):
        decode(noise(3, 4), max_pixels=LIMIT)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_pixels_stay_as_they_are_stored_whatever_rotation_is_noted(
    kind: str, orientation: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, noted = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(stored, kind)
    Image.fromarray(pixels).save(noted, kind, exif=exif)
    expected = decode(stored.getvalue(), max_pixels=LIMIT)
    np.testing.assert_array_equal(decode(noted.getvalue(), max_pixels=LIMIT), expected)
    header = read_header(noted.getvalue())
    assert header is not None
    assert header.is_turned == (2 <= orientation <= 8)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("L", (64, 64), 9).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    begin = content.rindex(b"\xff\xda")
    last = content[begin:-2]
    few = content[:begin] + last * 20 + content[-2:]
    assert decode(few, max_pixels=LIMIT).shape == (64, 64, 3)
    many = content[:begin] + last * 200 + content[-2:]
    with pytest.raises(UnreadableImageError, match="has over 100 scans"):
        decode(many, max_pixels=LIMIT)
    with pytest.raises(UnreadableImageError, match="has over 100 scans"):
        decode_unless_plain(many, max_pixels=LIMIT)
    # What looks like a scan within a segment, or behind the end, is none.
    filling = last[:2] * 200
    segment = b"\xff\xec" + (len(filling) + 2).to_bytes(2, "big") + filling
    for harmless in (content[:2] + segment + content[2:], content + filling):
        assert decode(harmless, max_pixels=LIMIT).shape == (64, 64, 3)
    # Nor does a second picture in the file excuse the first.
    stream = io.BytesIO()
    image = Image.new("L", (64, 64), 9)
    image.save(stream, "MPO", progressive=True, save_all=True, append_images=[image])
    stereo = stream.getvalue()
    assert decode(stereo, max_pixels=LIMIT).shape == (64, 64, 3)
    end = stereo.index(last) + len(last)
    with pytest.raises(UnreadableImageError, match="has over 100 scans"):
        decode(stereo[:end] + last * 200 + stereo[end:], max_pixels=LIMIT)


def test_a_rotation_that_a_tiff_notes_in_xmp_alone_is_ignored() -> None:
    pixels = noise(4, 8, 3)
    note = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = encoded(Image.fromarray(pixels), "TIFF", tiffinfo={700: note})
    with Image.open(io.BytesIO(file)) as turned:
        turned.load()
        assert turned.size == (4, 8)  # Pillow alone would turn it
    np.testing.assert_array_equal(decode(file, max_pixels=LIMIT), pixels)
