"""Transform of images: square, upright pixels on white, 8 bits per channel.

The requests of an SVG are checked before it is drawn to PNG. resvg opens files that an SVG names,
draws at the size that it declares, and recurses as deep as its elements are nested. So the text is
first parsed with expat, which sees the same names, attributes and entities as resvg.
"""

import base64
import io
import re
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from skillnet.rust_panics import panics_as_errors

#: Increase it when a change of this file or of drawing.py changes the pixels of any file.
VERSION = 4
#: Pixels of a side.
SIZE = 48
#: An SVG is drawn this many times larger and then reduced like a photograph.
SVG_SCALE = 2
#: Pillow modes without an alpha channel. A file may still declare one colour transparent.
OPAQUE_MODES = ("RGB", "L", "CMYK")
#: Pillow modes of grey with more than 8 bits. Pillow would clip them at 255, which is white.
DEEP_GREY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
#: Pillow modes without a conversion to RGB.
UNKNOWN_COLOURS = ("LAB", "HSV")
HEIC = "a HEIC image, which is not read. Convert it to JPEG, for example with heif-convert"
NO_WHITE = "no file states which of them is white. Save it with 8 or 16 bits per channel"
#: TIFF tags: bits of a sample, meaning of 0 (0: white), and kind of numbers (1: without sign).
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
#: Formats that Pillow may detect. It supports dozens more; EPS would be a program that it runs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA", "DIB"),
)
MAX_PIXELS = 64 * 2**20
TOO_LARGE = f"an image of more than {MAX_PIXELS // 10**6} million pixels"


def decode_image(data: bytes, size: int = SIZE) -> Any:
    """Decode an image file of any format in ``FORMATS``, or an SVG.

    The size is read from the header and checked before anything is decoded. A JPEG is decoded at
    the smallest scale that has twice the target size, which takes a tenth of the time for a
    smartphone photograph. The image is rotated by its EXIF orientation, because smartphones store
    the image of the sensor together with the orientation of the device.

    Args:
        data: bytes of the file.
        size: target side in pixels; an SVG is drawn ``SVG_SCALE`` times as large.

    Returns:
        Pillow image of mode RGBA, or RGB if it cannot be transparent.

    Raises:
        ValueError: the bytes are not an image, it is damaged or has more than 64 million pixels,
            or an SVG refers to other files.
    """
    if is_svg(data):
        data = draw_svg(data, size * SVG_SCALE)
    try:
        image = _open(data)
    except Exception as error:
        if _is_heic(data):
            raise ValueError(HEIC) from None
        raise _make_decode_error(error) from None
    return _convert(image, size)


def _convert(image: Any, size: int) -> Any:
    """Check an opened image, rotate it upright, and convert it to RGB or RGBA."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(TOO_LARGE)
    if image.mode == "F":
        raise ValueError(f"an image of fractions: {NO_WHITE}")
    if image.mode in UNKNOWN_COLOURS:
        raise ValueError(f"an image of {image.mode} colours. Save it as RGB")
    bits, is_inverted = _read_grey_range(image)
    try:
        image.draft("RGB", (2 * size, 2 * size))  # no effect for other formats than JPEG
        _rotate_upright(image)
        if image.mode in DEEP_GREY_MODES:
            grey = _take_high_bytes(image, bits)
            image = _pillow().fromarray(255 - grey if is_inverted else grey)
        opaque = image.mode in OPAQUE_MODES and not image.has_transparency_data
        return image.convert("RGB" if opaque else "RGBA")
    except MemoryError:
        raise
    except Exception as error:
        raise _make_decode_error(error) from None


def read_image_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of an upright image in pixels, from its header; ``None`` for an SVG.

    Raises:
        ValueError: the bytes are not an image.
    """
    if is_svg(data):
        return None
    try:
        image = _open(data)
        is_rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception as error:
        raise _make_decode_error(error) from None
    return (image.height, image.width) if is_rotated else (image.width, image.height)


def _rotate_upright(image: Any) -> None:
    """Rotate an image upright in place. Damaged EXIF data are ignored."""
    from PIL import ImageOps

    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return


def _is_heic(data: bytes) -> bool:
    """Return whether a file is HEIC by its brands (ISO 14496-12); AVIF has others."""
    return data[4:8] == b"ftyp" and any(
        brand in data[8:32] for brand in (b"heic", b"heix", b"hevc")
    )


def _read_grey_range(image: Any) -> tuple[int, bool]:
    """Return the bits per sample of an opened image of deep grey, and whether 0 is white.

    Raises:
        ValueError: the samples have no defined white: 32 bits, or numbers with a sign.
    """
    if image.mode not in DEEP_GREY_MODES:
        return 8, False
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        # Of other files, Pillow scales PGM to 16 bits. An array of integers has no range.
        if image.mode == "I" and image.format not in ("PNG", "PPM", "JPEG2000"):
            raise ValueError(f"an image of 32-bit integers: {NO_WHITE}")
        return 16, False
    bits, kind = _first(tags.get(_BITS, 16)), _first(tags.get(_SAMPLE_FORMAT, 1))
    if bits > 16 or kind != 1:
        raise ValueError(
            f"an image of {bits}-bit integers{' with a sign' * (kind == 2)}: {NO_WHITE}"
        )
    return bits, _first(tags.get(_PHOTOMETRIC, 1)) == 0


def _first(value: Any) -> int:
    """Return the number of a TIFF tag, which can be one per channel."""
    return int(value[0] if isinstance(value, tuple) else value)


def _take_high_bytes(image: Any, bits: int) -> NDArray[np.uint8]:
    """Return the 8 highest of the bits of a grey image, uint8 (H, W)."""
    return (np.clip(np.asarray(image), 0, (1 << bits) - 1) >> (bits - 8)).astype(np.uint8)


def _make_decode_error(error: Exception) -> ValueError:
    """Return the reason for an error of Pillow. Damaged files raise almost any exception."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return ValueError("not an image (PNG, JPEG or SVG expected)")
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(TOO_LARGE)
    # Rows are counted by their reason, so it must not contain a number of bytes.
    cause = str(error).split(" (")[0] if isinstance(error, OSError) else type(error).__name__
    return ValueError(f"a damaged image ({cause})")


def crop_image(image: Any, size: int = SIZE) -> NDArray[np.uint8]:
    """Return the centre square of a Pillow image on white, uint8 (size, size, 3).

    Args:
        image: Pillow image of mode RGB or RGBA.
        size: side of the result in pixels.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(_place_on_white(_resize(square, (size, size)), (size, size)))


def fit_image(image: Any, size: int = SIZE) -> NDArray[np.uint8]:
    """Fit a Pillow image into a white square, uint8 (size, size, 3).

    Transparent pixels become white. A transparent margin is removed, because its width reveals the
    artist and not the content. The aspect ratio stays.

    Args:
        image: Pillow image of mode RGB or RGBA.
        size: side of the result in pixels.
    """
    if image.mode == "RGBA":
        image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.width, image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(_place_on_white(_resize(image, (width, height)), (size, size)))


def _resize(image: Any, shape: tuple[int, int]) -> Any:
    from PIL import Image

    if image.mode == "RGB":
        return image.resize(shape, Image.Resampling.LANCZOS)
    # Premultiplied alpha keeps the colour of transparent pixels out of the edges.
    return image.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")


def _place_on_white(image: Any, shape: tuple[int, int]) -> Any:
    """Return an image centred on a white canvas of shape (width, height), mode RGB."""
    from PIL import Image

    if image.mode == "RGB" and image.size == shape:
        return image
    offset = ((shape[0] - image.width) // 2, (shape[1] - image.height) // 2)
    canvas = Image.new(image.mode, shape, (255, 255, 255, 255)[: len(image.mode)])
    if image.mode == "RGB":
        canvas.paste(image, offset)
    else:
        canvas.alpha_composite(image, offset)
    return canvas.convert("RGB")


def load_pixels(data: bytes, size: int = SIZE, fit: str = "pad") -> NDArray[np.uint8]:
    """Decode an image file to pixels, uint8 (size, size, 3).

    Args:
        data: bytes of the file.
        size: side of the square in pixels.
        fit: "pad" fits the complete image on white, "crop" takes its centre square.

    Raises:
        ValueError: the bytes are not an image.
    """
    return _make_square(decode_image(data, size), size, fit)


def convert_image(image: Any, size: int = SIZE, fit: str = "pad") -> NDArray[np.uint8]:
    """Convert an image in memory to pixels as :func:`load_pixels` does, uint8 (size, size, 3).

    Args:
        image: Pillow image of any mode, or uint8 pixels (H, W) or (H, W, 3 or 4).
        size: side of the square in pixels.
        fit: see :func:`load_pixels`.

    Raises:
        ValueError: it is no image, or has more than 64 million pixels.
    """
    pillow = _pillow()
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
            raise ValueError(
                f"pixels are {image.dtype} {image.shape}, expected uint8 (H, W), (H, W, 3) or "
                "(H, W, 4)"
            )
        image = pillow.fromarray(image)
    elif not isinstance(image, pillow.Image):
        raise ValueError(f"no image but {type(image).__name__}")
    # A copy, because the rotation changes the image in place.
    return _make_square(_convert(image.copy(), size), size, fit)


def _make_square(image: Any, size: int, fit: str) -> NDArray[np.uint8]:
    return crop_image(image, size) if fit == "crop" else fit_image(image, size)


def _open(data: bytes) -> Any:
    return _pillow().open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats of ``FORMATS`` that this build of Pillow supports."""
    pillow = _pillow()
    pillow.init()
    return tuple(name for name in FORMATS if name in pillow.OPEN)


@cache
def _pillow() -> Any:
    """Return Pillow's Image module, without its warning about sizes that are rejected here."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image


#: Bytes of an SVG file.
MAX_BYTES = 8 * 2**20
#: A taller image is drawn narrower. Groups and filters each allocate an image of this size.
MAX_DRAWN_PIXELS = 4 * 2**20
#: Pixels of all images embedded in an SVG, the limit of a photograph.
MAX_EMBEDDED_PIXELS = 64 * 2**20
#: Levels of nested elements.
MAX_DEPTH = 1000
#: Expat before 2.7 recurses into entities that refer to each other. Illustrator writes ten.
MAX_ENTITIES = 1000
#: resvg stops at a depth of 1,024, but a default stack overflows at 120.
STACK_BYTES = 128 * 2**20
#: The value of CSS. Without one, the binding ignores a width in millimetres.
DPI = 96
#: Not a directory: a reference that passed the check finds no file there.
NO_RESOURCES_DIR = "/dev/null"

REFERS_TO_FILE = "an SVG that refers to another file"
EMBEDS_UNSUPPORTED = "an SVG with an embedded part that is not PNG, JPEG, GIF or WebP"
_EMBEDDED = re.compile(r"\s*data:image/(?:png|jpe?g|gif|webp)((?:;[^,#]*)?),", re.IGNORECASE)


def is_svg(data: bytes) -> bool:
    """Return whether the bytes of a file are an SVG."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"<svg", b"<?xml", b"<!--")):
        return True
    return head.startswith(b"<") and b"<svg" in head


def draw_svg(data: bytes, side: int) -> bytes:
    """Draw an SVG as a PNG file.

    Args:
        data: bytes of the SVG.
        side: width in pixels. The height is limited to ``MAX_DRAWN_PIXELS`` in total, or a square.

    Raises:
        ValueError: the bytes are not an SVG, or it is damaged, too large, or refers to other
            files.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"an SVG of more than {MAX_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a damaged SVG (not UTF-8)") from None
    _check_svg(data)
    return _run_with_stack(lambda: _draw(text, side))


class _SvgChecker:
    """Handlers of a parser that raise ValueError for an unsafe SVG."""

    def __init__(self) -> None:
        self.depth = self.entities = self.pixels = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        element = _strip_namespace(name)
        if self.depth == 0 and element != "svg":
            raise ValueError("XML, but not an SVG")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"an SVG of more than {MAX_DEPTH} nested elements")
        if element in ("image", "feImage"):
            for key, value in attributes.items():
                if _strip_namespace(key) == "href":
                    self.href(value)

    def end(self, name: str) -> None:
        self.depth -= 1

    def entity(self, *declared: Any) -> None:
        self.entities += 1
        if self.entities > MAX_ENTITIES:
            raise ValueError(f"an SVG of more than {MAX_ENTITIES} entities")

    def skipped(self, *entity: Any) -> None:
        raise ValueError("a damaged SVG (an undeclared entity)")

    def href(self, value: str) -> None:
        match = _EMBEDDED.match(value)
        if match:
            self.pixels += _count_pixels(match[1], value[match.end() :])
            if self.pixels > MAX_EMBEDDED_PIXELS:
                raise ValueError(
                    f"an SVG with images of more than {MAX_EMBEDDED_PIXELS // 10**6} million pixels"
                )
        elif value.strip()[:5].lower() == "data:":
            # The part may be an SVG, which would need a check of its own.
            raise ValueError(EMBEDS_UNSUPPORTED)
        elif value.strip() and not value.startswith("#"):
            raise ValueError(REFERS_TO_FILE)


def _check_svg(data: bytes) -> None:
    # resvg gets decoded text. The encoding that the file declares must not change the text here.
    parser, check = expat.ParserCreate("utf-8"), _SvgChecker()
    parser.StartElementHandler, parser.EndElementHandler = check.start, check.end
    parser.EntityDeclHandler, parser.SkippedEntityHandler = check.entity, check.skipped
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"a damaged SVG ({expat.ErrorString(error.code)})") from None


def _count_pixels(parameters: str, rest: str) -> int:
    """Return the number of pixels of an embedded image, from its header."""
    from PIL import Image

    try:
        # Decode as resvg does (WHATWG URL and Fetch). Otherwise it could draw an unchecked image.
        data = unquote_to_bytes(re.sub(r"[\t\n\r]|#.*", "", rest, flags=re.DOTALL))
        if re.search("; *base64$", parameters, re.IGNORECASE):
            data = base64.b64decode(data)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
            return image.width * image.height
    except Exception:  # damaged images raise almost any exception
        raise ValueError(EMBEDS_UNSUPPORTED) from None


def _strip_namespace(name: str) -> str:
    return name.rpartition(":")[2]


def _draw(text: str, side: int) -> bytes:
    import resvg_py

    try:
        with panics_as_errors("a damaged drawing"):
            return bytes(
                resvg_py.svg_to_bytes(
                    svg_string=text,
                    width=side,
                    height=max(side, MAX_DRAWN_PIXELS // side),
                    resources_dir=NO_RESOURCES_DIR,
                    dpi=DPI,
                )
            )
    except ValueError as error:
        # Rows are counted by their reason, so it must not contain a position.
        raise ValueError(f"a damaged SVG ({re.sub('[0-9]+', 'N', str(error))[:80]})") from None


def _run_with_stack(action: Callable[[], bytes]) -> bytes:
    """Run an action in a thread with a stack that is large enough for deeply nested SVGs.

    Signals do not interrupt the thread. They would not interrupt resvg either, which holds the GIL.
    """
    outcome: list[bytes | BaseException] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            outcome.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(outcome[0], bytes):
        return outcome[0]
    raise outcome[0]
