"""SVG files of others: what they may not ask of their reader, and what they may."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.transforms import drawing, image

NAMES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def png(side: int = 8) -> bytes:
    """A red square."""
    target = io.BytesIO()
    Image.new("RGB", (side, side), (255, 0, 0)).save(target, "PNG")
    return target.getvalue()


def svg(body: str, about: str = 'width="64" height="64"', before: str = "") -> bytes:
    """A drawing as a file."""
    return f"{before}<svg {NAMES} {about}>{body}</svg>".encode()


def embedded(data: bytes, kind: str) -> str:
    """An image element that carries its picture."""
    coded = base64.b64encode(data).decode()
    return f'<image width="64" height="64" xlink:href="data:image/{kind};base64,{coded}"/>'


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A red picture outside of every corpus."""
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
def test_a_drawing_that_refers_to_another_file_is_refused(
    body: str, before: str, secret: str
) -> None:
    data = svg(body.replace("PATH", secret), before=before.replace("PATH", secret))
    with pytest.raises(ValueError, match=r"refers to another file|not PNG, JPEG"):
        image.load_pixels(data)


def test_an_encoding_that_the_file_names_hides_nothing(secret: str) -> None:
    body = f'<image width="64" height="64" href="{secret}"/>'
    for name in ("utf-16", "utf-7", "cp037", "gbk"):
        with pytest.raises(ValueError, match=r"SVG|refers to another file"):
            image.load_pixels(svg(body, before=f'<?xml version="1.0" encoding="{name}"?>'))


def test_a_drawing_within_a_drawing_is_refused(secret: str) -> None:
    inner = svg(f'<image width="64" height="64" href="{secret}"/>')
    for kind in ("svg+xml", "png"):
        with pytest.raises(ValueError, match="not PNG, JPEG, GIF or WebP"):
            image.load_pixels(svg(embedded(inner, kind)))


def test_a_file_that_slips_through_is_not_found(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(secret).parent)
    monkeypatch.setattr(drawing, "_check_svg", lambda data: None)
    pixels = image.load_pixels(svg('<image width="64" height="64" href="secret.png"/>'))
    assert (pixels == 255).all()


def test_an_embedded_picture_is_drawn_and_a_huge_one_is_not() -> None:
    assert (image.load_pixels(svg(embedded(png(), "png"))) == [255, 0, 0]).all()
    target = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(target, "PNG")
    with pytest.raises(ValueError, match="million pixels"):
        image.load_pixels(svg(embedded(target.getvalue(), "png")))


def test_an_embedded_picture_is_measured_as_it_is_drawn() -> None:
    """Line ends count for nothing, nor what follows a number sign; packed or percent signs."""
    coded = base64.b64encode(png()).decode()
    lines = "&#10;".join(coded[at : at + 20] for at in range(0, len(coded), 20))
    plain = "".join(f"%{byte:02x}" for byte in png())
    for rest in (f";base64,{lines}", f"; BASE64,{coded}#more", f",{plain[:30]}&#10;{plain[30:]}"):
        data = svg(f'<image width="64" height="64" href="data:image/png{rest}"/>')
        assert (image.load_pixels(data) == [255, 0, 0]).all(), rest


def test_a_file_of_illustrator_is_drawn() -> None:
    """With entities, an external DTD that nobody fetches, and a reference within the drawing."""
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
def test_no_drawing_is_larger_than_is_needed(about: str) -> None:
    body = '<rect width="1" height="1000000"/>'
    with Image.open(io.BytesIO(drawing.draw_svg(svg(body, about), 96))) as drawn:
        assert drawn.width * drawn.height <= drawing.MAX_DRAWN_PIXELS


def test_sizes_may_have_any_unit() -> None:
    """Inkscape writes millimetres, other programs inches and points."""
    for unit in ("mm", "in", "pt", "px", "cm"):
        body = f'<rect width="9{unit}" height="9{unit}" fill="#f00"/>'
        data = svg(body, f'width="7{unit}" height="7{unit}"')
        assert (image.load_pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize(("width", "height"), [(30, 30), (90, 30), (30, 90), (7, 250)])
def test_usual_drawings_are_as_wide_as_was_asked_for(width: int, height: int) -> None:
    data = svg('<rect width="9" height="9"/>', f'width="{width}" height="{height}"')
    with Image.open(io.BytesIO(drawing.draw_svg(data, 96))) as drawn:
        assert drawn.size == (96, int(np.ceil(96 * height / width)))


def test_deep_drawings_end_nothing() -> None:
    """A usual stack ends at a few hundred elements nested elements."""
    square = '<rect width="64" height="64" fill="#f00"/>'
    assert (image.load_pixels(svg("<g>" * 900 + square + "</g>" * 900)) == [255, 0, 0]).all()
    with pytest.raises(ValueError, match="nested elements"):
        image.load_pixels(svg("<g>" * 20_000 + "</g>" * 20_000))
    chain = "".join(f'<g id="a{n + 1}"><use href="#a{n}"/></g>' for n in range(2_000))
    with pytest.raises(ValueError, match="nodes limit"):
        image.load_pixels(svg(f'<g id="a0">{square}</g>{chain}'))


def entities(count: int, times: int) -> str:
    """A DOCTYPE whose entities each hold the one before so many times."""
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
def test_what_is_no_sound_drawing_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="SVG"):
        image.load_pixels(data)


def test_a_photograph_that_speaks_of_svg_is_a_photograph() -> None:
    target = io.BytesIO()
    Image.new("RGB", (30, 20), (250, 0, 0)).save(target, "JPEG", comment=b"<svg> made by a tool")
    assert b"<svg" in target.getvalue()[:512]
    assert image.read_image_size(target.getvalue()) == (30, 20)
    assert image.load_pixels(target.getvalue(), 8, "crop")[..., 0].min() > 200


def test_what_stands_before_a_drawing_hides_it_not() -> None:
    drawn = svg('<rect width="64" height="64" fill="#f00"/>')
    for before in (b"\xef\xbb\xbf\n ", b"<!DOCTYPE svg>", b"<!-- " + b"licence " * 99 + b"-->"):
        assert (image.load_pixels(before + drawn) == [255, 0, 0]).all()
