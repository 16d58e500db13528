"""Hostile audio, videos and images: allowed decoders and forbidden requests."""

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
def test_playlists_open_no_other_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    "data",
    [saved(Image.new("RGB", (32, 32)), "PNG"), saved(Image.new("RGB", (32, 32)), "JPEG"),
     DRAWN, b"1\n00:00:01,000 --> 00:00:02,000\nhi\n\n"],
    ids=["png", "jpeg", "svg", "subtitles"],
)  # fmt: skip
def test_image_is_not_a_video(data: bytes) -> None:
    with pytest.raises(ValueError, match="a playlist, an image"):
        video.load_video_frames(data)


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
        riff(SAMPLES, 2 * len(SAMPLES)),
        riff(SAMPLES, 2 * len(SAMPLES), 0xFFFFFFFF),
        riff(SAMPLES, 2 * len(SAMPLES), 0),
        riff(SAMPLES, len(SAMPLES))[:-2],
        rf64(SAMPLES, 2 * len(SAMPLES)),
        rf64(SAMPLES, len(SAMPLES))[:-2],
        b"BW64" + rf64(SAMPLES, 1 << 40)[4:],
    ],
    ids=["half", "half of a stream", "half of zero", "a sample", "rf64", "rf64 sample", "bw64"],
)
def test_truncated_wav_is_detected(data: bytes) -> None:
    with pytest.raises(ValueError, match="cut short"):
        sound.decode_audio(data)


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


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "DDS", "ICNS"])
def test_rare_image_formats_are_rejected(kind: str) -> None:
    data = saved(Image.new("RGB", (128, 128)), kind)
    for read in (image.load_pixels, image.read_image_size):
        with pytest.raises(ValueError, match="not an image"):
            read(data)


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


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_image_of_fractions_is_rejected(value: float) -> None:
    data = saved(Image.fromarray(np.full((16, 16), value, np.float32)), "TIFF")
    with pytest.raises(ValueError, match="fractions"):
        image.load_pixels(data)
