"""Hostile audio, videos and images: allowed decoders and forbidden requests.

Hostile SVG files: forbidden and allowed requests.
"""

import base64
import io
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.transforms import containers, image, sound, video
from tests.helpers.hostile_corpora import clip, unknown_codec
from tests.unit.pipelines.data.transforms.test_transforms import encoded, mp3, tone, wav

DRAWN = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def saved(picture: Image.Image, kind: str, **more: Any) -> bytes:
    """Return an image file."""
    target = io.BytesIO()
    picture.save(target, kind, **more)
    return target.getvalue()


def riff(
    samples: bytes, size: int, riff_size: int | None = None, form: int = 1, bits: int = 16
) -> bytes:
    """Return a WAV file of mono samples at 16 kHz with declared sizes."""
    about = struct.pack("<HHIIHH", form, 1, 16_000, 2_000 * bits, bits // 8, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + about + b"data" + struct.pack("<I", size)
    whole = len(chunks) + len(samples) if riff_size is None else riff_size
    return b"RIFF" + struct.pack("<I", whole) + chunks + samples


def rf64(samples: bytes, size: int) -> bytes:
    """Return the same file with 64-bit sizes."""
    plain = riff(samples, 0xFFFFFFFF)
    sizes = struct.pack("<IQQQI", 28, size + 72, size, 0, 0)
    return b"RF64\xff\xff\xff\xffWAVEds64" + sizes + plain[12:]


SAMPLES = (tone(0.5, 16_000) * 20_000).astype("<i2").tobytes()


@pytest.mark.parametrize(
    "name", ["list.mp3", "list.mp4", "hls.mp3", "dash.mp3", "dash.mp4", "session.mp3"]
)
def test_playlists_open_no_other_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret.mp3").write_bytes(mp3(tone(), 32_000))
    Path("secret.mp4").write_bytes(clip())
    secret = f"secret.{name[-3:]}"
    made = {
        "list": f"ffconcat version 1.0\nfile '{secret}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        f'mediaPresentationDuration="PT3S"><BaseURL>file://{tmp_path}/</BaseURL><Period>'
        '<AdaptationSet><Representation id="1" bandwidth="1000">'
        f"<BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "session": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        "m=audio 19444 RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n",
    }[name[:-4]]
    # FFmpeg finds lists of segments by their names, too, and here there are none.
    reported = "not (audio|a video)" if name[:-4] in ("hls", "dash") else "a playlist"
    with pytest.raises(ValueError, match=reported):
        (sound.load_log_mel if name.endswith("mp3") else video.load_video_frames)(made.encode())


def test_allowed_formats_exist_and_are_no_playlists() -> None:
    for name in containers.FORMATS:
        assert av.ContainerFormat(name, "r").is_input, name
    bad = {"hls", "dash", "concat", "sdp", "rtsp", "image2", "vobsub", "imf", "lavfi", "webm_dash"}
    assert not bad & set(containers.FORMATS)


def test_unknown_codec_is_a_bad_row() -> None:
    data = unknown_codec()
    for read in (video.load_video_frames, video.count_frames, video.read_video_size):
        with pytest.raises(ValueError, match="codec that FFmpeg does not know"):
            read(data)
    spoken = encoded(tone(0.5, 48_000), 48_000, "matroska", "libopus")
    with pytest.raises(ValueError, match="codec that FFmpeg does not know"):
        sound.decode_audio(spoken.replace(b"A_OPUS", b"A_ZZZZ"))


def test_cover_image_is_not_a_video() -> None:
    cover = b"\0image/jpeg\0\3\0" + saved(Image.new("RGB", (32, 32)), "JPEG")
    tag = b"APIC" + struct.pack(">I", len(cover)) + b"\0\0" + cover
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    data = b"ID3\3\0\0" + size + tag + mp3(tone(), 32_000)
    assert sound.decode_audio(data).size
    with pytest.raises(ValueError, match="no video"):
        video.load_video_frames(data)


@pytest.mark.parametrize("form", ["w64", "aiff", "caf", "au", "nut"])
def test_old_audio_formats_are_read_within_the_list(form: str) -> None:
    data = encoded(tone(), 32_000, form, "pcm_s16be" if form in ("aiff", "au") else "pcm_s16le")
    if form == "nut":
        with pytest.raises(ValueError, match="not read as audio"):
            sound.decode_audio(data)
    else:
        assert np.allclose(sound.decode_audio(data), sound.decode_audio(wav(tone(), 32_000)))


@pytest.mark.parametrize("form", ["mpegts", "avi", "flv", "mov", "matroska"])
def test_common_video_formats_are_read(form: str) -> None:
    target = io.BytesIO()
    with av.open(target, "w", format=form) as out:
        stream: Any = out.add_stream("flv" if form == "flv" else "mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            picture = np.full((64, 64, 3), 30 * number, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    made = video.load_video_frames(target.getvalue(), 8, 16)
    assert np.abs(made.mean((1, 2, 3)) - 30 * np.arange(8)).max() < 12


def test_samples_that_overflow_are_rejected() -> None:
    loud = np.tile(np.array([3e38, -3e38], "<f4"), 4_000).tobytes()
    data = riff(loud, len(loud), form=3, bits=32)
    assert np.isfinite(sound.decode_audio(data)).all()
    for trimmed in (True, False):
        with pytest.raises(ValueError, match="not finite"):
            sound.load_log_mel(data, trimmed=trimmed)
    less = (tone(0.5, 16_000) * 1e25).astype("<f4").tobytes()
    assert np.isfinite(sound.load_log_mel(riff(less, len(less), form=3, bits=32))).all()


@pytest.mark.parametrize(
    "data",
    [
        riff(SAMPLES, len(SAMPLES)) + b"LIST\4\0\0\0more",
        riff(SAMPLES, 0, 0),  # a recorder that was switched off
        riff(SAMPLES, 0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg to a pipe
        riff(SAMPLES, 0x7FFFF000, 0x7FFFF024),  # sox to a pipe
        riff(SAMPLES, len(SAMPLES) + 44),
        rf64(SAMPLES, len(SAMPLES)),
    ],
    ids=["more behind", "zero", "ffmpeg", "sox", "head counted in", "rf64"],
)
def test_wav_of_unknown_length_is_complete(data: bytes) -> None:
    assert sound.decode_audio(data).size == len(SAMPLES) // 2


@pytest.mark.parametrize(
    "kind",
    ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "AVIF"],
)
def test_common_image_formats_are_read(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    more = (
        {"append_images": [Image.new("RGB", (64, 64))], "save_all": True} if kind == "MPO" else {}
    )
    data = saved(Image.new("RGB", (64, 64), (220, 20, 30)), kind, **more)
    assert np.abs(image.load_pixels(data, 16).astype(int) - [220, 20, 30]).max() < 9


NAMES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def png(side: int = 8) -> bytes:
    """Return a red square."""
    return saved(Image.new("RGB", (side, side), (255, 0, 0)), "PNG")


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


def test_unchecked_reference_finds_no_file(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(secret).parent)
    monkeypatch.setattr(image, "_check_svg", lambda data: None)
    pixels = image.load_pixels(svg('<image width="64" height="64" href="secret.png"/>'))
    assert (pixels == 255).all()


def test_embedded_image_is_drawn_unless_it_is_huge() -> None:
    assert (image.load_pixels(svg(embedded(png(), "png"))) == [255, 0, 0]).all()
    huge = saved(Image.new("1", (9_000, 9_000)), "PNG")
    with pytest.raises(ValueError, match="million pixels"):
        image.load_pixels(svg(embedded(huge, "png")))


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


READERS = {
    "a video": video.load_video_frames, "sound": sound.decode_audio, "an image": image.load_pixels,
    "the size of an image": image.read_image_size,
}  # fmt: skip
ELSEWHERE = '<image width="64" height="64" href="/etc/hostname"/>'
HALF = 2 * len(SAMPLES)
#: Reader, what is wrong -> the file, and the message.
REJECTED: dict[tuple[str, str], tuple[bytes, str]] = {
    ("a video", "png"): (png(32), "a playlist, an image"),
    ("a video", "jpeg"): (saved(Image.new("RGB", (32, 32)), "JPEG"), "a playlist, an image"),
    ("a video", "svg"): (DRAWN, "a playlist, an image"),
    ("a video", "subtitles"): (
        b"1\n00:00:01,000 --> 00:00:02,000\nhi\n\n", "a playlist, an image"
    ),
    ("sound", "half"): (riff(SAMPLES, HALF), "cut short"),
    ("sound", "half of a stream"): (riff(SAMPLES, HALF, 0xFFFFFFFF), "cut short"),
    ("sound", "half of zero"): (riff(SAMPLES, HALF, 0), "cut short"),
    ("sound", "a sample"): (riff(SAMPLES, len(SAMPLES))[:-2], "cut short"),
    ("sound", "rf64"): (rf64(SAMPLES, HALF), "cut short"),
    ("sound", "rf64 sample"): (rf64(SAMPLES, len(SAMPLES))[:-2], "cut short"),
    ("sound", "bw64"): (b"BW64" + rf64(SAMPLES, 1 << 40)[4:], "cut short"),
    **{
        (reader, kind): (saved(Image.new("RGB", (128, 128)), kind), "not an image")
        for reader in ("an image", "the size of an image")
        for kind in ("EPS", "PCX", "SGI", "DDS", "ICNS")
    },
    ("an image", "NaN"): (
        saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"), "fractions"
    ),
    **{
        ("an image", name): (
            svg(ELSEWHERE, before=f'<?xml version="1.0" encoding="{name}"?>'),
            "SVG|refers to another file",
        )
        for name in ("utf-16", "utf-7", "cp037", "gbk")
    },
    **{
        ("an image", f"svg as {kind}"): (svg(embedded(svg(ELSEWHERE), kind)), "not PNG, JPEG, GIF")
        for kind in ("svg+xml", "png")
    },
    ("an image", "bomb"): (svg("&e9;", before=entities(9, 10)), "SVG"),
    ("an image", "chain"): (svg("&e5000;", before=entities(5_000, 1)), "SVG"),
    ("an image", "undeclared"): (svg("&none;", before='<!DOCTYPE svg SYSTEM "none.dtd">'), "SVG"),
    ("an image", "no svg"): (b"<?xml version='1.0'?><html/>", "SVG"),
    ("an image", "null"): (svg("\0"), "SVG"),
}  # fmt: skip


@pytest.mark.parametrize(("reader", "kind"), REJECTED)
def test_hostile_and_damaged_files_are_rejected(reader: str, kind: str) -> None:
    data, message = REJECTED[reader, kind]
    with pytest.raises(ValueError, match=message):
        READERS[reader](data)


def test_photograph_that_mentions_svg_is_a_photograph() -> None:
    data = saved(Image.new("RGB", (30, 20), (250, 0, 0)), "JPEG", comment=b"<svg> made by a tool")
    assert b"<svg" in data[:512]
    assert image.read_image_size(data) == (30, 20)
    assert image.load_pixels(data, 8, "crop")[..., 0].min() > 200


def test_text_before_an_svg_does_not_hide_it() -> None:
    drawn = svg('<rect width="64" height="64" fill="#f00"/>')
    for before in (b"\xef\xbb\xbf\n ", b"<!DOCTYPE svg>", b"<!-- " + b"licence " * 99 + b"-->"):
        assert (image.load_pixels(before + drawn) == [255, 0, 0]).all()
