"""SVG images to PNG. The requests of an SVG are checked before it is drawn.

resvg opens files that an SVG names, draws at the size that it declares, and recurses as deep as
its elements are nested. So the text is first parsed with expat, which sees the same names,
attributes and entities as resvg.
"""

import base64
import io
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.parsers import expat

from skillnet.serialization import panics_as_errors

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
