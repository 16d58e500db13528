"""Hostile SVG files: forbidden and allowed requests."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.transforms import image

NAMES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def png(side: int = 8) -> bytes:
    """Return a red square."""
    target = io.BytesIO()
    Image.new("RGB", (side, side), (255, 0, 0)).save(target, "PNG")
    return target.getvalue()


def svg(body: str, about: str = 'width="64" height="64"', before: str = "") -> bytes:
    """Return an SVG file."""
    return f"{before}<svg {NAMES} {about}>{body}</svg>".encode()


def embedded(data: bytes, kind: str) -> str:
    """Return an image element with embedded data."""
    coded = base64.b64encode(data).decode()
    return f'<image width="64" height="64" xlink:href="data:image/{kind};base64,{coded}"/>'


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """Write a red image outside of all corpora."""
    path = tmp_path / "secret.png"
    path.write_bytes(png())
    return str(path)


@pytest.mark.parametrize(
    ("body", "before"),
    [
        ('<image width="64" height="64" href="PATH"/>', ""),
        ('<image width="64" height="64" xlink:href="PATH"/>', ""),
        ('<image width="64" height="64" href=" data:,PATH" xlink:href="PATH"/>', ""),
        ('<s:image xmlns:s="http://www.w3.org/2000/svg" width="64" height="64" href="PATH"/>', ""),
        ('<image width="64" height="64" href="file://PATH"/>', ""),
        ('<image width="64" height="64" href="&#x2f;..PATH"/>', ""),
        ('<image width="64" height="64" href="&p;"/>', '<!DOCTYPE svg [<!ENTITY p "PATH">]>'),
        ("&i;", "<!DOCTYPE svg [<!ENTITY i \"<image width='64' height='64' href='PATH'/>\">]>"),
        ("&i;", "<!DOCTYPE svg [<!ENTITY p 'PATH'><!ENTITY i \"<image width='64' height='64' "
         "href='&p;'/>\">]>"),
        ('<filter id="f"><feImage href="PATH"/></filter>'
         '<rect filter="url(#f)" width="64" height="64"/>', ""),
    ],
)  # fmt: skip
def test_svg_that_refers_to_another_file_is_rejected(body: str, before: str, secret: str) -> None:
    data = svg(body.replace("PATH", secret), before=before.replace("PATH", secret))
    with pytest.raises(ValueError, match=r"refers to another file|not PNG, JPEG"):
        image.load_pixels(data)


def test_declared_encoding_hides_no_reference(secret: str) -> None:
    body = f'<image width="64" height="64" href="{secret}"/>'
    for name in ("utf-16", "utf-7", "cp037", "gbk"):
        with pytest.raises(ValueError, match=r"SVG|refers to another file"):
            image.load_pixels(svg(body, before=f'<?xml version="1.0" encoding="{name}"?>'))


def test_svg_in_an_svg_is_rejected(secret: str) -> None:
    inner = svg(f'<image width="64" height="64" href="{secret}"/>')
    for kind in ("svg+xml", "png"):
        with pytest.raises(ValueError, match="not PNG, JPEG, GIF or WebP"):
            image.load_pixels(svg(embedded(inner, kind)))


def test_unchecked_reference_finds_no_file(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(secret).parent)
    monkeypatch.setattr(image, "_check_svg", lambda data: None)
    pixels = image.load_pixels(svg('<image width="64" height="64" href="secret.png"/>'))
    assert (pixels == 255).all()


def test_embedded_image_is_drawn_unless_it_is_huge() -> None:
    assert (image.load_pixels(svg(embedded(png(), "png"))) == [255, 0, 0]).all()
    target = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(target, "PNG")
    with pytest.raises(ValueError, match="million pixels"):
        image.load_pixels(svg(embedded(target.getvalue(), "png")))


def test_embedded_image_is_measured_as_it_is_drawn() -> None:
    """Line ends and text after a number sign are ignored; base64 and percent encoding work."""
    coded = base64.b64encode(png()).decode()
    lines = "&#10;".join(coded[at : at + 20] for at in range(0, len(coded), 20))
    plain = "".join(f"%{byte:02x}" for byte in png())
    for rest in (f";base64,{lines}", f"; BASE64,{coded}#more", f",{plain[:30]}&#10;{plain[30:]}"):
        data = svg(f'<image width="64" height="64" href="data:image/png{rest}"/>')
        assert (image.load_pixels(data) == [255, 0, 0]).all(), rest


def test_illustrator_file_is_drawn() -> None:
    """The file has entities, an external DTD that is not fetched, and an internal reference."""
    before = (
        '<?xml version="1.0" encoding="utf-8"?><!-- Generator: Adobe Illustrator 16.0.0 -->'
        '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
        '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd" ['
        '<!ENTITY ns_svg "http://www.w3.org/2000/svg"><!ENTITY st0 "fill:#FF0000;">]>'
    )
    data = svg(
        '<defs><rect id="r" width="64" height="64"/></defs><use xlink:href="#r" style="&st0;"/>',
        'xmlns:x="&ns_svg;" viewBox="0 0 64 64" width="64px" height="64px"',
        before,
    )
    assert (image.load_pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    "about",
    [
        'width="1" height="40000000"',
        'viewBox="0 0 1 1000000"',
        'width="1mm" height="1e6in"',
        'width="1000000" height="1"',
        "",
    ],
)
def test_drawn_size_is_limited(about: str) -> None:
    body = '<rect width="1" height="1000000"/>'
    with Image.open(io.BytesIO(image.draw_svg(svg(body, about), 96))) as drawn:
        assert drawn.width * drawn.height <= image.MAX_DRAWN_PIXELS


def test_sizes_may_have_any_unit() -> None:
    """Inkscape writes millimetres, other programs inches and points."""
    for unit in ("mm", "in", "pt", "px", "cm"):
        body = f'<rect width="9{unit}" height="9{unit}" fill="#f00"/>'
        data = svg(body, f'width="7{unit}" height="7{unit}"')
        assert (image.load_pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize(("width", "height"), [(30, 30), (90, 30), (30, 90), (7, 250)])
def test_drawn_width_is_the_requested_width(width: int, height: int) -> None:
    data = svg('<rect width="9" height="9"/>', f'width="{width}" height="{height}"')
    with Image.open(io.BytesIO(image.draw_svg(data, 96))) as drawn:
        assert drawn.size == (96, int(np.ceil(96 * height / width)))


def test_deeply_nested_svg_crashes_nothing() -> None:
    """A default stack overflows at a few hundred nested elements."""
    square = '<rect width="64" height="64" fill="#f00"/>'
    assert (image.load_pixels(svg("<g>" * 900 + square + "</g>" * 900)) == [255, 0, 0]).all()
    with pytest.raises(ValueError, match="nested elements"):
        image.load_pixels(svg("<g>" * 20_000 + "</g>" * 20_000))
    chain = "".join(f'<g id="a{n + 1}"><use href="#a{n}"/></g>' for n in range(2_000))
    with pytest.raises(ValueError, match="nodes limit"):
        image.load_pixels(svg(f'<g id="a0">{square}</g>{chain}'))


def entities(count: int, times: int) -> str:
    """Return a DOCTYPE whose entities each repeat the previous entity."""
    chain = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * times}">' for n in range(count))
    return f'<!DOCTYPE svg [<!ENTITY e0 "aaaaaaaaaa">{chain}]>'


@pytest.mark.parametrize(
    "data",
    [
        svg("&e9;", before=entities(9, 10)),
        svg("&e5000;", before=entities(5_000, 1)),
        svg("&none;", before='<!DOCTYPE svg SYSTEM "none.dtd">'),
        b"<?xml version='1.0'?><html/>",
        svg("\0"),
    ],
    ids=["bomb", "chain", "undeclared", "no svg", "null"],
)  # fmt: skip
def test_damaged_svg_is_rejected(data: bytes) -> None:
    with pytest.raises(ValueError, match="SVG"):
        image.load_pixels(data)


def test_photograph_that_mentions_svg_is_a_photograph() -> None:
    target = io.BytesIO()
    Image.new("RGB", (30, 20), (250, 0, 0)).save(target, "JPEG", comment=b"<svg> made by a tool")
    assert b"<svg" in target.getvalue()[:512]
    assert image.read_image_size(target.getvalue()) == (30, 20)
    assert image.load_pixels(target.getvalue(), 8, "crop")[..., 0].min() > 200


def test_text_before_an_svg_does_not_hide_it() -> None:
    drawn = svg('<rect width="64" height="64" fill="#f00"/>')
    for before in (b"\xef\xbb\xbf\n ", b"<!DOCTYPE svg>", b"<!-- " + b"licence " * 99 + b"-->"):
        assert (image.load_pixels(before + drawn) == [255, 0, 0]).all()
