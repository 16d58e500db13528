"""Decoding of media files, and the pixels, frames and functions computed from them."""

import io
import wave
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.transforms import code, image, sound, video
from skillnet_corpora.demo.strokes import draw_pen_paths
from tests.helpers import video_files as clips
from tests.helpers.video_files import encode_video


def picture(kind: str, size: tuple[int, int] = (60, 30)) -> bytes:
    """Return a red rectangle as a file."""
    target = io.BytesIO()
    Image.new("RGB", size, (220, 20, 30)).save(target, kind)
    return target.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_keeps_its_aspect_ratio_on_white(kind: str) -> None:
    pixels = image.load_pixels(picture(kind))
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[:11] == 255).all()
    assert (pixels[37:] == 255).all()
    assert np.abs(pixels[13:35].astype(int) - [220, 20, 30]).max() < 6


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [24, 90])
def test_opaque_image_gives_equal_pixels_without_alpha(fit: str, size: int) -> None:
    """The fast path of opaque images gives the pixels of the path of transparent images."""
    colours = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    files = []
    for mode in ("RGB", "RGBA"):
        target = io.BytesIO()
        Image.fromarray(colours).convert(mode).save(target, "PNG")
        files.append(target.getvalue())
    opaque, transparent = (image.load_pixels(data, size, fit) for data in files)
    assert np.array_equal(opaque, transparent)


def test_declared_transparent_colour_becomes_white() -> None:
    target = io.BytesIO()
    Image.new("RGB", (30, 20), (10, 20, 30)).save(target, "PNG", transparency=(10, 20, 30))
    assert (image.load_pixels(target.getvalue(), 8, "crop") == 255).all()


def held(orientation: int) -> bytes:
    """Return a photograph of 64 x 32, black left on the sensor and white right."""
    seen = np.zeros((32, 64, 3), np.uint8)
    seen[:, 32:] = 255
    target, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(seen).save(target, "JPEG", quality=95, exif=exif)
    return target.getvalue()


@pytest.mark.parametrize(
    ("orientation", "white"),
    [(1, np.s_[:, 16:]), (3, np.s_[:, :16]), (6, np.s_[16:]), (8, np.s_[:16])],
)
def test_photograph_is_rotated_upright(orientation: int, white) -> None:
    made = image.load_pixels(held(orientation), 32, "crop" if orientation in (1, 3) else "pad")
    expected = np.zeros((32, 32), bool)
    expected[white] = True
    if orientation in (6, 8):  # upright and narrow, with white on both sides
        expected[:, :8] = expected[:, 24:] = True
    assert ((made[..., 0] > 127) == expected).mean() > 0.95


def test_damaged_exif_is_ignored() -> None:
    whole = held(6)
    place = whole.index(b"Exif") + 6
    broken = whole[:place] + b"\xff" * 12 + whole[place + 12 :]
    assert image.decode_image(broken, 32).size == (64, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_stay_greys(kind: str) -> None:
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    target = io.BytesIO()
    Image.fromarray(np.tile(ramp, (32, 1))).save(target, kind)
    made = image.load_pixels(target.getvalue(), 32)
    assert np.array_equal(made, np.broadcast_to((ramp >> 8)[None, :, None], (32, 32, 3)))


def test_svg_is_drawn_without_its_margin() -> None:
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        b'<rect x="30" y="30" width="12" height="12" fill="#0000ff"/></svg>'
    )
    pixels = image.load_pixels(svg)
    assert (pixels[4:44, 4:44] == [0, 0, 255]).all()


def test_transparent_pixels_become_white_not_black() -> None:
    target = io.BytesIO()
    drawn = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    drawn.paste((0, 200, 0, 255), (0, 0, 48, 24))
    drawn.putpixel((47, 47), (0, 200, 0, 255))
    drawn.save(target, "PNG")
    pixels = image.load_pixels(target.getvalue())
    assert (pixels[30, 5] == 255).all()
    assert tuple(pixels[5, 5]) == (0, 200, 0)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", picture("PNG")[:60], b"<svg><rect"])
def test_non_image_is_rejected(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"image|SVG"):
        image.load_pixels(data)


def tone(seconds: float = 0.5, rate: int = 32_000, hertz: float = 1000.0) -> np.ndarray:
    """Return a sine between silences, with a constant offset of the recorder."""
    time = np.arange(int(seconds * rate)) / rate
    quiet = np.zeros(rate // 2)
    return np.concatenate([quiet, 0.5 * np.sin(2 * np.pi * hertz * time), quiet]) + 0.1


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Return samples as a WAV file."""
    target = io.BytesIO()
    with wave.open(target, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return target.getvalue()


def encoded(samples: np.ndarray, rate: int, kind: str, codec: str, layout: str = "s16") -> bytes:
    """Encode samples in a container and codec that takes 16-bit samples."""
    target = io.BytesIO()
    with av.open(target, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        data = (samples * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(data, format=layout, layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return target.getvalue()


def mp3(samples: np.ndarray, rate: int) -> bytes:
    """Return samples as an MP3 file."""
    return encoded(samples, rate, "mp3", "mp3", "s16p")


@pytest.mark.parametrize("encode", [wav, mp3])
def test_audio_is_resampled_trimmed_and_peaks_at_its_pitch(encode) -> None:
    decoded = sound.decode_audio(encode(tone(), 32_000))
    assert abs(len(decoded) - 24_000) < 1_600
    mel = sound.compute_log_mel(decoded)
    assert mel.dtype == np.float32
    assert mel.shape[1] == 80
    assert 46 <= len(mel) <= 56  # the half second of tone, without the silence on either side
    edges = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 8000 / 700), 82)
    centre = 700 * (10 ** (edges[1:-1] / 2595) - 1)
    assert abs(centre[mel[20].argmax()] - 1000) < 60


def test_mel_filters_are_triangles() -> None:
    """A tone at a filter's centre is loudest there, and tones between centres are shared."""
    centres = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([20.0, 8000.0]) / 700)), 82)
                            / 2595) - 1)  # fmt: skip
    time = np.arange(sound.RATE) / sound.RATE
    for mel in (20, 40, 60, 75):
        tone = np.sin(2 * np.pi * centres[mel + 1] * time).astype(np.float32)
        frames = sound.compute_log_mel(tone, trimmed=False)
        assert frames.flags.c_contiguous
        assert (frames.mean(axis=0).argmax()) == mel


def test_level_does_not_change_the_result() -> None:
    loud = sound.compute_log_mel(sound.decode_audio(wav(tone(), 32_000)))
    quiet = sound.compute_log_mel(sound.decode_audio(wav(tone() * 0.25, 32_000)))
    assert np.abs(loud[5:45] - quiet[5:45]).max() < 0.15


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE HTML><title>404 Not Found</title>", "web page"),
        (b"not sound at all", "not audio"),
        (b"", "not audio"),
    ],
)
def test_non_audio_is_rejected(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sound.decode_audio(data)


@pytest.mark.parametrize("end", [-1, -4_000, -8_000])
def test_truncated_ogg_file_is_detected(end: int) -> None:
    whole = encoded(tone(4.0, 48_000), 48_000, "ogg", "libopus")
    pages = whole.count(b"OggS")
    assert pages > 3
    with pytest.raises(ValueError, match="cut short"):
        sound.decode_audio(whole[:end])


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("ogg", "libopus"), ("webm", "libopus"), ("flac", "flac"), ("mp4", "aac"), ("adts", "aac")],
)
def test_audio_formats_give_similar_frames(kind: str, codec: str) -> None:
    """Opus from voice messages and browsers, and other common formats."""
    rate = 48_000
    said = tone(0.5, rate)
    mel = sound.compute_log_mel(sound.decode_audio(encoded(said, rate, kind, codec)))
    plain = sound.compute_log_mel(sound.decode_audio(wav(said, rate)))
    assert abs(len(mel) - len(plain)) < 8
    assert abs(int(mel[20].argmax()) - int(plain[20].argmax())) <= 1


def test_silence_is_rejected() -> None:
    with pytest.raises(ValueError, match="silent"):
        sound.compute_log_mel(np.zeros(16_000, np.float32))


PATHS = [[(0.1, 0.2), (0.9, 0.2)], [(0.5, 0.3), (0.5, 0.9)]]


def test_video_survives_an_mp4_file() -> None:
    frames = draw_pen_paths(PATHS)
    read = video.load_video_frames(encode_video(frames))
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames.astype(int)).mean() < 6


def test_longer_video_is_sampled_to_its_end() -> None:
    frames = np.zeros((31, 40, 60, 3), np.uint8)
    frames += np.arange(31, dtype=np.uint8)[:, None, None, None] * 8
    out = video.sample_frames(frames)
    assert out.shape == (8, 32, 32, 1)
    assert out[:, 0, 0, 0].tolist() == [24, 56, 88, 120, 152, 184, 216, 240]


def test_frames_keep_their_colour_only_with_three_channels() -> None:
    frames = np.zeros((4, 40, 60, 3), np.uint8)
    frames[:2, ..., 0] = 200
    frames[2:, ..., 2] = 200
    colour = video.sample_frames(frames, 2, 16, 3)
    assert colour.shape == (2, 16, 16, 3)
    assert colour[:, 8, 8].tolist() == [[200, 0, 0], [0, 0, 200]]
    assert video.sample_frames(frames, 2, 16).shape == (2, 16, 16, 1)
    assert (video.sample_frames(frames[..., :1], 2, 16, 3)[0] == 200).all()  # grey to colour


@pytest.mark.parametrize(
    ("matrix", "numbers"),
    [
        ((1, 0, 0, 1), (1, 2, 3, 4)),
        ((0, 1, -1, 0), (3, 1, 4, 2)),  # held upright: a quarter turn with the clock
        ((-1, 0, 0, -1), (4, 3, 2, 1)),
        ((0, -1, 1, 0), (2, 4, 1, 3)),
        ((-1, 0, 0, 1), (2, 1, 4, 3)),  # a mirror, as some front cameras write
        ((0, 1, 1, 0), (1, 3, 2, 4)),
        ((0, 0, 0, 0), (1, 2, 3, 4)),  # no matrix at all
    ],
)
def test_video_is_rotated_upright(matrix, numbers):
    """Quarters 1 2 above 3 4 are identified by their grey."""
    quarters = np.array([[50, 100], [150, 200]], np.uint8).repeat(16, 0).repeat(16, 1)
    wide = np.pad(quarters, ((0, 0), (8, 8)))
    data = clips.held(encode_video(np.stack([wide] * 4)[..., None]), *matrix)
    for frame in video.load_video_frames(data, 3, 32)[..., 0]:
        seen = [frame[:14, :14], frame[:14, 18:], frame[18:, :14], frame[18:, 18:]]
        assert [round(part.mean() / 50) for part in seen] == list(numbers)
    assert video.read_video_size(data) == ((128, 192) if matrix[1] else (192, 128))
    colour = video.load_video_frames(data, 3, 32, 3)
    assert colour.shape == (3, 32, 32, 3)
    grey = video.load_video_frames(data, 3, 32)
    assert np.abs(colour.astype(int) - grey).max() < 8  # the same quarters at the same places


def test_non_video_is_rejected() -> None:
    with pytest.raises(ValueError, match="not a video"):
        video.load_video_frames(b"\0" * 400)


SOURCE = '''
import os

class Box:
    @property
    def size(self):
        """返回盒子的大小，见 https://example.org/a?b=1 说明

        更多。
        """
        # 注释
        return self._size + 1

    async def open(self, name="x"): """打开一个盒子"""; return os.open(name)

def outer():
    if True:
        def inner(): return 1
    return inner
'''


def test_functions_lose_their_docstring_and_keep_the_rest() -> None:
    found = {f.name: f for f in code.parse_functions(SOURCE)}
    assert list(found) == ["Box.size", "Box.open", "outer", "outer.inner"]
    size = found["Box.size"]
    assert size.summary == "返回盒子的大小，见 说明"
    assert size.code == "def size(self):\n    # 注释\n    return self._size + 1"
    assert found["Box.open"].summary == "打开一个盒子"
    assert "打开" not in found["Box.open"].code
    assert found["outer.inner"].summary == ""
    for function in found.values():
        compile(function.code, "f", "exec")


def test_non_python_is_rejected() -> None:
    with pytest.raises(ValueError, match="not Python"):
        list(code.parse_functions("def f(:"))
    with pytest.raises(ValueError, match="not UTF-8"):
        code.decode_source("中文".encode("gbk"))


def test_long_elif_chain_is_parsed() -> None:
    chain = "".join(f"    elif x == {n}:\n        y = {n}\n" for n in range(1_200))
    source = f"def f(x):\n    '''说明'''\n    if x:\n        def g(): pass\n{chain}    return y"
    assert [f.name for f in code.parse_functions(source)] == ["f", "f.g"]
    assert "说明" not in code.remove_docstring(source)


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ('def f(:\n    """说明"""\n    x', "def f(:\n    x"),
        ('def f(:\n  ur"""一\n二 """ 三\n四"""  \n  x', "def f(:\n  x"),
        ('def f(:\n  """一" """"\n  x', "def f(:\n  x"),
        ("def f(:\n  \"\"\"一\n  '''二'''\n  x", 'def f(:\n  """一\n  x'),
        ('def f(:\n  x = """一"""\n  y', 'def f(:\n  x = """一"""\n  y'),
        ('def f(:\n  """一"""', "def f(:"),
    ],
)
def test_unparsable_source_loses_its_first_text(source: str, left: str) -> None:
    assert code.remove_docstring(source) == left


def test_unclosed_texts_are_skipped_in_linear_time() -> None:
    """If each text were searched to the end, this would take hours."""
    source = "def f(:" + 300_000 * '\n"""a' + 300_000 * "\n'''b"
    assert code.remove_docstring(source) == source
