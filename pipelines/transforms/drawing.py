"""Drawings (SVG) to PNG. What a drawing may ask of its reader is checked before it is drawn.

resvg opens the files that a drawing names, makes its picture as high as the drawing says, and goes
as deep as its elements lie. So the text is read once with expat, which sees names, attributes
and entities as resvg does, before resvg gets it.
"""

import base64
import io
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.parsers import expat

MAX_BYTES = 8 * 2**20
#: A taller picture is drawn narrower: groups and filters each take a picture of that size again.
MAX_DRAWN_PIXELS = 4 * 2**20
#: Of all pictures within a drawing together: that is what a photograph may have.
MAX_EMBEDDED_PIXELS = 64 * 2**20
MAX_DEPTH = 1000
#: Expat (before 2.7) goes as deep as they build on each other. Illustrator writes ten.
MAX_ENTITIES = 1000
#: resvg ends at a depth of 1,024 by itself, but a usual stack ends at 120.
STACK_BYTES = 128 * 2**20
#: Of CSS. The binding's own default is none, which makes nothing of a width in millimetres.
DPI = 96
#: No folder: where the files would lie that slipped through.
NO_RESOURCES_DIR = "/dev/null"

REFERS_TO_FILE = "a drawing that refers to another file"
EMBEDS_UNSUPPORTED = "a drawing with an embedded part that is no PNG, JPEG, GIF or WebP"
_EMBEDDED = re.compile(r"\s*data:image/(?:png|jpe?g|gif|webp)((?:;[^,#]*)?),", re.IGNORECASE)


def is_svg(data: bytes) -> bool:
    """Whether a file is to be read as an SVG."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"<svg", b"<?xml", b"<!--")):
        return True
    return head.startswith(b"<") and b"<svg" in head


def draw_svg(data: bytes, side: int) -> bytes:
    """A drawing as a PNG file ``side`` pixels wide, of at most ``MAX_DRAWN`` pixels or a square.

    Raises:
        ValueError: the bytes are no SVG, or a damaged one; it is too large or refers to other
            files.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"an SVG of more than {MAX_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a damaged SVG (not UTF-8)") from None
    _check(data)
    return _with_stack(lambda: _draw(text, side))


class _Check:
    """Handlers of a parser; what they refuse is raised as ValueError."""

    def __init__(self) -> None:
        self.depth = self.entities = self.pixels = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        element = _local(name)
        if self.depth == 0 and element != "svg":
            raise ValueError("XML, but no SVG")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"an SVG of more than {MAX_DEPTH} elements within each other")
        if element in ("image", "feImage"):
            for key, value in attributes.items():
                if _local(key) == "href":
                    self.href(value)

    def end(self, name: str) -> None:
        self.depth -= 1

    def entity(self, *declared: Any) -> None:
        self.entities += 1
        if self.entities > MAX_ENTITIES:
            raise ValueError(f"an SVG of more than {MAX_ENTITIES} entities")

    def skipped(self, *entity: Any) -> None:
        raise ValueError("a damaged SVG (an entity that it does not declare)")

    def href(self, value: str) -> None:
        found = _EMBEDDED.match(value)
        if found:
            self.pixels += _pixels(found[1], value[found.end() :])
            if self.pixels > MAX_EMBEDDED_PIXELS:
                raise ValueError(
                    f"a drawing with pictures of more than {MAX_EMBEDDED_PIXELS // 10**6} million pixels"
                )
        elif value.strip()[:5].lower() == "data:":
            raise ValueError(
                EMBEDS_UNSUPPORTED
            )  # a drawing, too: it would have to be checked in its turn
        elif value.strip() and not value.startswith("#"):
            raise ValueError(REFERS_TO_FILE)


def _check(data: bytes) -> None:
    # resvg gets text: an encoding that the file names must not make other text of it here.
    parser, check = expat.ParserCreate("utf-8"), _Check()
    parser.StartElementHandler, parser.EndElementHandler = check.start, check.end
    parser.EntityDeclHandler, parser.SkippedEntityHandler = check.entity, check.skipped
    try:
        parser.Parse(data, True)
    except expat.ExpatError as problem:
        raise ValueError(f"a damaged SVG ({expat.ErrorString(problem.code)})") from None


def _pixels(parameters: str, rest: str) -> int:
    """How many pixels an embedded picture has, by its head."""
    from PIL import Image

    try:
        # As resvg reads it (WHATWG's URL and Fetch): or it would draw what was not looked at.
        data = unquote_to_bytes(re.sub(r"[\t\n\r]|#.*", "", rest, flags=re.DOTALL))
        if re.search("; *base64$", parameters, re.IGNORECASE):
            data = base64.b64decode(data)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP")) as picture:
            return picture.width * picture.height
    except Exception:  # as for any picture, damaged ones raise nearly everything there is
        raise ValueError(EMBEDS_UNSUPPORTED) from None


def _local(name: str) -> str:
    return name.rpartition(":")[2]


def _draw(text: str, side: int) -> bytes:
    import resvg_py

    try:
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=text,
                width=side,
                height=max(side, MAX_DRAWN_PIXELS // side),
                resources_dir=NO_RESOURCES_DIR,
                dpi=DPI,
            )
        )
    except ValueError as problem:
        raise ValueError(f"a damaged SVG ({re.sub('[0-9]+', 'N', str(problem))[:80]})") from None
    except BaseException as problem:
        # A panic of the Rust library is no Exception.
        if type(problem).__name__ != "PanicException":
            raise
        raise ValueError("a damaged SVG (its drawing failed)") from None


def _with_stack(action: Callable[[], bytes]) -> bytes:
    """What ``action`` returns or raises, run on a stack that deep drawings do not end.

    A signal does not reach it, but neither does one reach resvg otherwise: it keeps Python's lock.
    """
    found: list[bytes | BaseException] = []

    def run() -> None:
        try:
            found.append(action())
        except BaseException as problem:
            found.append(problem)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(found[0], bytes):
        return found[0]
    raise found[0]
