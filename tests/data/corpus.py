"""Bad and odd images, made anew for every test: what each is, and what must become of it."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Odd:
    """An image file whose reading is laid down."""

    name: str
    content: bytes
    pixels: Pixels | None = None  # [h,w,3] that must come out; None: it must be refused
    reason: str = ""  # pattern of why it is refused
    tolerance: int = 0  # most that a value may differ
    traits: tuple[str, ...] = ()  # as a scan names them


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    """Write a PNG by hand; `rows` are uncompressed, each behind its filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = zlib.compress(rows, 9)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", packed),
            chunk(b"IEND", b""),
        ]
    )


def bomb(side: int = 12_000) -> bytes:
    """A whole, valid PNG of `side` x `side` black pixels in a few KB."""
    rows = (b"\0" * (1 + (side + 7) // 8)) * side
    return png(side, side, depth=1, colour=0, rows=rows)


def flat(*colour: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (24, 16), colour if len(colour) > 1 else colour[0])


def rgb(*colour: int) -> Pixels:
    return np.broadcast_to(np.array(colour, np.uint8), (16, 24, 3)).copy()


def damaged() -> Iterator[Odd]:
    whole = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    yield Odd("truncated.jpg", whole[: len(whole) // 2], reason="truncated")
    yield Odd("header_only.jpg", whole[:300], reason="Error|truncated|not one of")
    yield Odd("zero.png", b"", reason="^empty file$")
    yield Odd("page.jpg", b"<!DOCTYPE html><html>404</html>", reason="^not one of JPEG")
    yield Odd("random.jpg", noise(4000, seed=3).tobytes(), reason="^not one of JPEG")
    flawed = bytearray(encoded(Image.fromarray(noise(40, 40, 3)), "PNG"))
    yield Odd("truncated.png", bytes(flawed[:2000]), reason="truncated")
    flawed[60] ^= 0xFF
    yield Odd("flipped.png", bytes(flawed), reason="Error")
    yield Odd("bomb.png", bomb(), reason=r"^declares 144000000 pixels \(limit 64000000\)$")
    yield Odd("worse.png", bomb(20_000), reason=r"^declares 400000000 pixels \(limit 64000000\)$")
    yield Odd(
        "float.tif",
        encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        reason="^colour mode F is not accepted$",
    )
    yield Odd(
        "integers.tif",
        encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
        reason="range",
    )
    yield Odd("icon.png", encoded(flat(1, 2, 3), "ICO"), reason="^not one of JPEG")


def inks() -> Iterator[Odd]:
    ink = (40, 200, 90, 30)  # cyan, magenta, yellow, black
    mixed = [round((255 - part) * (255 - ink[3]) / 255) for part in ink[:3]]
    file = encoded(flat(*ink, mode="CMYK"), "JPEG", quality=100)
    yield Odd("cmyk.jpg", file, rgb(*mixed), tolerance=2)
    place = file.index(b"\xff\xee\x00\x0eAdobe")
    # Pillow takes inks for inverted, as Adobe writes them, with the marker and without.
    yield Odd("unmarked.jpg", file[:place] + file[place + 16 :], rgb(*mixed), tolerance=2)
    # The same four planes, said to be luma and chroma: stored inverted, then turned into colours.
    y, cb, cr, k = (255 - part for part in ink)
    red = y + 1.402 * (cr - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    blue = y + 1.772 * (cb - 128)
    # What comes out of the colour transform is inverted ink once more.
    cyan = [np.clip(part, 0, 255) for part in (red, green, blue)]
    turned = [round((255 - part) * k / 255) for part in cyan]
    marked = bytearray(file)
    marked[place + 15] = 2
    yield Odd("ycck.jpg", bytes(marked), rgb(*turned), tolerance=3)
    yield Odd("cmyk.tif", encoded(flat(*ink, mode="CMYK"), "TIFF"), rgb(*mixed), tolerance=1)


def depths() -> Iterator[Odd]:
    grey, alpha, colour = noise(9, 7), noise(9, 7, seed=1), noise(9, 7, 3)
    three = np.repeat(grey[..., None], 3, axis=2)
    wide = np.random.default_rng(2).integers(0, 65536, (9, 7), dtype=np.uint16)
    scaled = np.repeat(np.rint(wide / 257).astype(np.uint8)[..., None], 3, axis=2)
    wide_colour = np.random.default_rng(3).integers(0, 65536, (9, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide_colour)
    with_alpha = Image.fromarray(np.dstack([colour, alpha]))
    table = noise(256, 3, seed=4)
    palette = Image.fromarray(grey, "L").convert("L").convert("P")
    palette.putpalette(table.tobytes())
    looked_up = table[np.asarray(palette)]
    bits = grey > 127
    yield Odd("grey.png", encoded(Image.fromarray(grey), "PNG"), three)
    yield Odd("grey_alpha.png", encoded(Image.merge("LA", bands(grey, alpha)), "PNG"), three)
    yield Odd("colour_alpha.png", encoded(with_alpha, "PNG"), colour)
    yield Odd("palette.png", encoded(palette, "PNG"), looked_up)
    yield Odd(
        "palette_alpha.png", encoded(palette, "PNG", transparency=bytes(range(256))), looked_up
    )
    yield Odd(
        "one_bit.png",
        encoded(Image.fromarray(bits), "PNG"),
        np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=2),
    )
    for kind, suffix in (("PNG", "png"), ("TIFF", "tif")):
        file = encoded(Image.fromarray(wide), kind)
        yield Odd(f"sixteen.{suffix}", file, scaled, traits=("16 bits or more",))
    yield Odd(
        "sixteen_colour.png",
        png(7, 9, depth=16, colour=2, rows=rows),
        (wide_colour >> 8).astype(np.uint8),
        traits=("16 bits or more",),
    )


def bands(*parts: Pixels) -> list[Image.Image]:
    return [Image.fromarray(part) for part in parts]


def extras() -> Iterator[Odd]:
    colour = noise(9, 7, 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, blue = flat(255, 0, 0), flat(0, 0, 255)
    image = Image.fromarray(colour)
    yield Odd("turned.png", encoded(image, "PNG", exif=turned), colour, traits=("turned by EXIF",))
    for orientation in (3, 6):
        note = {0x0112: orientation}
        for kind in ("raw", "tiff_lzw"):
            file = encoded(image, "TIFF", tiffinfo=note, compression=kind)
            name = f"turned_{orientation}_{kind}.tif"
            yield Odd(name, file, colour, traits=("turned by EXIF",))
    yield Odd(
        "turned.jpg",
        encoded(flat(90, 160, 40), "JPEG", exif=turned, quality=100),
        rgb(90, 160, 40),
        tolerance=2,
        traits=("turned by EXIF",),
    )
    yield Odd(
        "profile.png",
        encoded(image, "PNG", icc_profile=profile),
        colour,
        traits=("colour profile",),
    )
    for name, kind, options in (
        ("moving.gif", "GIF", {}),
        ("moving.webp", "WEBP", {"lossless": True}),
        ("moving.png", "PNG", {}),
        ("pages.tif", "TIFF", {}),
    ):
        file = encoded(red, kind, save_all=True, append_images=[blue], **options)
        yield Odd(name, file, rgb(255, 0, 0), traits=("several frames",))
    yield Odd(
        "stereo.jpg",
        encoded(red, "MPO", save_all=True, append_images=[blue]),
        rgb(255, 0, 0),
        tolerance=2,
        traits=("several frames",),
    )
    yield Odd("png_called.jpg", encoded(image, "PNG"), colour, traits=("wrong suffix",))
    yield Odd("one.png", encoded(flat(7, 8, 9).crop((0, 0, 1, 1)), "PNG"), rgb(7, 8, 9)[:1, :1])
    wide = noise(1, 30_000, 3)
    yield Odd("long.png", encoded(Image.fromarray(wide), "PNG"), wide)
    yield Odd(
        "tall.png", encoded(Image.fromarray(wide.reshape(-1, 1, 3)), "PNG"), wide.reshape(-1, 1, 3)
    )


def images() -> list[Odd]:
    """Every kind of file content."""
    return [*damaged(), *inks(), *depths(), *extras()]


def write_images(folder: Path) -> list[Odd]:
    """Write every kind of file, and some with names that are hard to print."""
    whole = encoded(Image.fromarray(noise(9, 7, 3, seed=9)), "PNG")
    named = [
        Odd(name, whole, noise(9, 7, 3, seed=9))
        for name in (
            "line\nbreak.png",
            os.fsdecode(b"\xff\xfe.png"),
            "\x1b[31mred.png",
            "ünicode.PNG",
        )
    ]
    made = [*images(), *named]
    for odd in made:
        (folder / odd.name).write_bytes(odd.content)
    return made


def write_traps(folder: Path) -> dict[str, str]:
    """Make what is no file but is called like an image; return why each is left out."""
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "above").symlink_to("..", target_is_directory=True)
    (folder / "ring").symlink_to("ring")
    return {
        "pipe.png": "a pipe, not a file",
        "dangling.png": "a link to nothing",
        "circle.png": "a link that leads to itself",
        "device.png": "a device, not a file",
    }
