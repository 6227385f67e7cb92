"""Encoded images to pixels: a short list of formats, a size limit, and one rule per colour mode.

Every mode becomes uint8 [h, w, 3] by a fixed rule:

* grey (1, L) is repeated in three channels; 16-bit grey is divided by 257 and rounded, 16-bit
  colour keeps its high bytes;
* alpha (LA, PA, RGBA, transparent palettes) is dropped, as TensorFlow's `decode_image` does: the
  colours under transparent pixels are kept as stored;
* palettes are looked up; CMYK and YCbCr take Pillow's formula; colour profiles are ignored;
* a rotation noted in EXIF, a TIFF's tags or XMP is ignored, as TensorFlow ignores it;
* of several frames only the first is read.

Other modes (32-bit integers beyond 16 bits, floats, LAB) have no agreed range and are refused.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from bigsimclr.data.names import printable
from bigsimclr.errors import DataError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")

_END: Final = b"\xff\xd9"  # a JPEG's last marker; without it something is missing
_GREY: Final = ([0], [1])
_COLOURS: Final = [1, 2, 3]
_BY_PILLOW: Final = frozenset({"1", "L", "P", "PA", "RGBX", "CMYK", "YCbCr"})
_ORIENTATION: Final = 0x0112  # the EXIF tag; 1 is upright, 2 to 8 are turned or mirrored
_TURNED_BACK: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_SCAN: Final = re.compile(rb"\xff\xda")  # begins a scan of a JPEG; never stands within one
# Any marker but the restarts, which stand within a scan as stuffed bytes do.
_MARKER: Final = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
_MOST_SCANS: Final = 100  # usual are 1, or about 10 of a progressive image; each decodes it anew


class UnreadableImageError(DataError):
    """One image cannot be used; the message is the reason in a few words."""


@dataclass(frozen=True)
class Header:
    """What the head of an image file declares; no pixel was decoded."""

    format: str  # as Pillow calls it
    mode: str
    is_wide: bool  # more than 8 bits for a channel
    is_turned: bool  # EXIF says that it is to be shown turned or mirrored
    has_frames: bool  # more than one
    has_profile: bool  # a colour profile


@dataclass(frozen=True)
class Jpeg:
    """A plain JPEG that is not decoded yet: 8 bits, grey or YCbCr, complete to its end marker."""

    encoded: bytes
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of its pixels."""
        return self.height, self.width, 3


def decode(
    encoded: bytes | NDArray[np.uint8],  # a file's content, or pixels [h, w, 3] already
    *,
    max_pixels: int,  # images that declare more are refused before they are decoded
) -> NDArray[np.uint8]:  # [h, w, 3]
    """Decode one image.

    Raises:
        UnreadableImageError: the image is damaged, too large, or of a kind not accepted.
    """
    if isinstance(encoded, np.ndarray):
        return _checked(encoded)
    with _judged(encoded, max_pixels) as image:
        return _rgb(_loaded(image))


def decode_unless_plain(
    encoded: bytes | NDArray[np.uint8], *, max_pixels: int
) -> NDArray[np.uint8] | Jpeg:
    """Leave a plain JPEG to another decoder, which makes the same pixels of it; decode the rest.

    Raises:
        UnreadableImageError: as `decode` does, but for damage beyond a plain JPEG's header.
    """
    if isinstance(encoded, np.ndarray):
        return _checked(encoded)
    with _judged(encoded, max_pixels) as image:
        if _is_plain(image) and encoded.endswith(_END):
            return Jpeg(encoded, height=image.height, width=image.width)
        return _rgb(_loaded(image))


def _loaded(image: Image.Image) -> Image.Image:
    """Decode an image as it is stored: Pillow turns TIFFs, and only them, by what they note."""
    noted = image.getexif().get(_ORIENTATION, 1) if isinstance(image, TiffImageFile) else 1
    image.load()
    turned_back = _TURNED_BACK.get(noted)
    return image if turned_back is None else image.transpose(turned_back)


def _checked(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UnreadableImageError(f"{pixels.dtype} {list(pixels.shape)} is not [h,w,3] uint8")
    return pixels


@contextmanager
def _judged(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and make one error of whatever happens to it."""
    if not encoded:
        raise UnreadableImageError("empty file")
    try:
        # Pillow warns of odd metadata that does not touch the pixels, once per process and so
        # differently for every number of workers.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                _check_cost(image, encoded, max_pixels)
                yield image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        # Pillow's own limit, tried while it reads the header.
        declared = re.search(r"\((\d+) pixels\)", str(error))
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        count = declared[1] if declared else f"over {most}"
        raise UnreadableImageError(f"declares {count} pixels (limit {most})") from None
    except Exception as error:
        # Damaged files make Pillow's readers raise almost any type.
        reason = printable(f"{type(error).__name__}: {error}")[:200]
        raise UnreadableImageError(reason) from error


def read_header(encoded: bytes) -> Header | None:
    """Say what the head of an image file declares; None where it cannot be understood."""
    with suppress(Exception), warnings.catch_warnings():  # as above: almost any type
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            # Pillow decodes a PNG to look for EXIF behind its pixels; what stands before will do.
            has_exif = "exif" in image.info or image.format == "TIFF"
            raw = image.tile[0].args if image.tile else ""
            depth = f"{image.mode} {raw if isinstance(raw, str) else raw[0] if raw else ''}"
            return Header(
                format=image.format or "",
                mode=image.mode,
                is_wide=re.search(r"16|32|^I|^F", depth) is not None,
                is_turned=has_exif and image.getexif().get(_ORIENTATION, 1) in _TURNED_BACK,
                has_frames=bool(getattr(image, "is_animated", False)),
                has_profile="icc_profile" in image.info,
            )
    return None


def encode_png(
    pixels: NDArray[np.uint8],  # [h, w, 3]
) -> bytes:
    """Encode pixels as a PNG file; the same pixels give the same bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def fitted(
    pixels: NDArray[np.uint8],  # [h, w, 3]
    side: int,  # pixels of the longer side
) -> NDArray[np.uint8]:
    """Bring an image to a size for people to look at; small ones keep their square pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(size, how))


def _check_cost(image: Image.Image, encoded: bytes, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise UnreadableImageError(f"declares {pixels} pixels (limit {max_pixels})")
    if pixels == 0:
        raise UnreadableImageError("has no pixels")
    if isinstance(image, JpegImageFile) and _has_many_scans(encoded):
        raise UnreadableImageError(f"has over {_MOST_SCANS} scans")


def _has_many_scans(encoded: bytes) -> bool:
    # A list of all that might be one takes microseconds, and almost always is short enough.
    if len(_SCAN.findall(encoded)) <= _MOST_SCANS:
        return False
    # The bytes may stand in a thumbnail, or in a film behind the image: go by its segments.
    scans, at = 0, 2
    while scans <= _MOST_SCANS:
        marker = _MARKER.search(encoded, at)
        if marker is None or marker[0] == _END:
            return False
        scans += _SCAN.fullmatch(marker[0]) is not None
        at = marker.end() + int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")
    return True


def _is_plain(image: Image.Image) -> bool:
    if not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.bits != 8:
        return False
    # Decoders guess by other numbers and by Adobe's note what the components are.
    components = [layer[0] for layer in image.layer]
    if image.mode == "L":
        return components in _GREY
    return (
        image.mode == "RGB" and components == _COLOURS and image.info.get("adobe_transform", 1) == 1
    )


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    mode = image.mode
    if mode == "RGB":
        return np.asarray(image)
    if mode in {"RGBA", "LA"}:
        stored = np.asarray(image)[..., :-1]
        return np.ascontiguousarray(np.broadcast_to(stored, (*stored.shape[:2], 3)))
    if mode in {"RGBa", "La"}:
        # Premultiplied alpha: the colours themselves come back by way of straight alpha.
        return _rgb(image.convert("RGBA" if mode == "RGBa" else "LA"))
    if mode.startswith("I;16") or mode == "I":
        return _from_16_bits(np.asarray(image).astype(np.int64))
    if mode in _BY_PILLOW:
        # Transparency listed beside a palette does not change its colours.
        image.info.pop("transparency", None)
        return np.asarray(image.convert("RGB"))
    raise UnreadableImageError(f"colour mode {printable(mode)} is not accepted")


def _from_16_bits(grey: NDArray[np.int64]) -> NDArray[np.uint8]:
    if grey.min() < 0 or grey.max() > 65535:
        raise UnreadableImageError("32-bit values have no agreed range")
    narrow = ((grey + 128) // 257).astype(np.uint8)
    return np.repeat(narrow[..., None], 3, axis=2)
