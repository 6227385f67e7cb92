"""Encoded images to pixels: a short list of formats, a size limit, and one rule per colour mode.

Every mode becomes uint8 [h, w, 3] by a fixed rule:

* grey (1, L) is repeated in three channels; 16-bit grey is divided by 257 and rounded;
* alpha (LA, PA, RGBA, transparent palettes) is dropped, as TensorFlow's `decode_image` does: the
  colours under transparent pixels are kept as stored;
* palettes are looked up; CMYK and YCbCr take Pillow's formula; colour profiles are ignored;
* a rotation noted in EXIF is ignored, as TensorFlow ignores it;
* of several frames only the first is read.

Other modes (32-bit integers beyond 16 bits, floats, LAB) have no agreed range and are refused.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from bigsimclr.data.names import printable
from bigsimclr.errors import DataError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")

_END: Final = b"\xff\xd9"  # a JPEG's last marker; without it something is missing
_GREY: Final = ([0], [1])
_COLOURS: Final = [1, 2, 3]
_BY_PILLOW: Final = frozenset({"1", "L", "P", "PA", "RGBX", "CMYK", "YCbCr"})


class UnreadableImageError(DataError):
    """One image cannot be used; the message is the reason in a few words."""


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
        image.load()
        return _rgb(image)


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
        image.load()
        return _rgb(image)


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
                _check_size(image, max_pixels)
                yield image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:
        # Damaged files make Pillow's readers raise almost any type.
        reason = printable(f"{type(error).__name__}: {error}")[:200]
        raise UnreadableImageError(reason) from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise UnreadableImageError(f"declares {pixels} pixels (limit {max_pixels})")
    if pixels == 0:
        raise UnreadableImageError("has no pixels")


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
