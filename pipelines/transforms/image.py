"""Pictures to pixels: square, upright, on white, 8 bits a channel."""

import io
import warnings
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.transforms.drawing import draw_svg, is_svg

#: Count it up when a change of this file or of drawing.py changes pixels that it makes of a file.
VERSION = 3
SIZE = 48
#: An SVG is drawn this many times larger and then reduced, as a photograph would be.
SVG_SCALE = 2
#: Modes of Pillow's without an alpha channel; a file may still say that one colour is none.
OPAQUE_MODES = ("RGB", "L", "CMYK")
#: Greys of 16 bits: of a PNG or TIFF; of a PGM. Pillow would cut them off at 255, which is white.
GREY_16BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
#: What Pillow may take a file for. It knows dozens more: EPS would be a program that it runs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA", "DIB"),
)
MAX_PIXELS = 64 * 2**20
TOO_LARGE = f"a picture of more than {MAX_PIXELS // 10**6} million pixels"


def decode_image(data: bytes, size: int = SIZE) -> Any:
    """Read a PNG, JPEG (or what else ``FORMATS`` names) or SVG file.

    Sizes are read from the file's head and checked before anything is decoded. A JPEG is decoded
    at the smallest scale that has twice the wanted side: for a photograph of a telephone that
    is a tenth of the time. It is turned as its EXIF orientation says: telephones write what the
    sensor saw, and how they were held.

    Args:
        data: the file's bytes.
        size: the side wanted later, in pixels: an SVG is drawn ``SVG_SCALE`` times as large.

    Returns:
        A Pillow image, mode RGBA, or RGB where nothing in it can be transparent.

    Raises:
        ValueError: the bytes are no picture, a damaged one, or one of more than 64 million pixels;
            or a drawing that refers to other files.
    """
    if is_svg(data):
        data = draw_svg(data, size * SVG_SCALE)
    try:
        image = _open(data)
    except Exception as problem:
        raise _refusal(problem) from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(TOO_LARGE)
    if image.mode == "F":
        raise ValueError("a picture of fractions: no file says which of them is white")
    try:
        image.draft("RGB", (2 * size, 2 * size))  # other formats than JPEG pass over it
        _turn(image)
        if image.mode in GREY_16BIT_MODES:
            image = _pillow().fromarray(_high_bytes(image))
        opaque = image.mode in OPAQUE_MODES and not image.has_transparency_data
        return image.convert("RGB" if opaque else "RGBA")
    except MemoryError:
        raise
    except Exception as problem:
        raise _refusal(problem) from None


def read_image_size(data: bytes) -> tuple[int, int] | None:
    """(Width, height) of a picture file in pixels, as it is shown; none of a drawing (SVG).

    Read from the file's head: nothing is decoded.

    Raises:
        ValueError: the bytes are no picture.
    """
    if is_svg(data):
        return None
    try:
        image = _open(data)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as problem:
        raise _refusal(problem) from None
    return (image.height, image.width) if turned else (image.width, image.height)


def _turn(image: Any) -> None:
    """Turn a picture upright, in place. Damaged EXIF data cost no picture."""
    from PIL import ImageOps

    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return


def _high_bytes(image: Any) -> NDArray[np.uint8]:
    """The upper halves of 16-bit greys: uint8 (H, W)."""
    return (np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8)


def _refusal(problem: Exception) -> ValueError:
    """What to say of an error of Pillow's. Damaged files raise nearly everything there is."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(problem, UnidentifiedImageError):
        return ValueError("not a picture (PNG, JPEG or SVG expected)")
    if isinstance(problem, Image.DecompressionBombError):
        return ValueError(TOO_LARGE)
    # Rows are counted by their reason: no numbers of bytes in it.
    told = str(problem).split(" (")[0] if isinstance(problem, OSError) else type(problem).__name__
    return ValueError(f"a damaged picture ({told})")


def crop_image(image: Any, size: int = SIZE) -> NDArray[np.uint8]:
    """The middle square of a photograph, on white, reduced: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(_on_white(_reduced(square, (size, size)), (size, size)))


def fit_image(image: Any, size: int = SIZE) -> NDArray[np.uint8]:
    """Fit a Pillow image into a white square: uint8 (size, size, 3).

    What is transparent becomes white, and a transparent margin is cut off: how much of it there
    is tells the artist, not what is drawn. The aspect ratio stays.
    """
    if image.mode == "RGBA":
        image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.width, image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(_on_white(_reduced(image, (width, height)), (size, size)))


def _reduced(image: Any, shape: tuple[int, int]) -> Any:
    from PIL import Image

    if image.mode == "RGB":
        return image.resize(shape, Image.Resampling.LANCZOS)
    # Premultiplied alpha keeps the colour of transparent pixels out of the edges.
    return image.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")


def _on_white(image: Any, shape: tuple[int, int]) -> Any:
    """In the middle of a white picture of that width and height, mode RGB."""
    from PIL import Image

    if image.mode == "RGB" and image.size == shape:
        return image
    place = ((shape[0] - image.width) // 2, (shape[1] - image.height) // 2)
    canvas = Image.new(image.mode, shape, (255, 255, 255, 255)[: len(image.mode)])
    if image.mode == "RGB":
        canvas.paste(image, place)
    else:
        canvas.alpha_composite(image, place)
    return canvas.convert("RGB")


def load_pixels(data: bytes, size: int = SIZE, fit: str = "pad") -> NDArray[np.uint8]:
    """A picture file's bytes to uint8 (size, size, 3).

    Args:
        data: the file's bytes.
        size: side of the square, in pixels.
        fit: "pad" shows all of it on white, "crop" its middle square.

    Raises:
        ValueError: the bytes are no picture.
    """
    image = decode_image(data, size)
    return crop_image(image, size) if fit == "crop" else fit_image(image, size)


def _open(data: bytes) -> Any:
    return _pillow().open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow has."""
    pillow = _pillow()
    pillow.init()
    return tuple(name for name in FORMATS if name in pillow.OPEN)


@cache
def _pillow() -> Any:
    """Pillow's Image module, which need not warn of what is refused here anyway."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image
