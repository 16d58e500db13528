"""Every pixel mode and sample format that the decoders accept, against one 8-bit original."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipelines.data.transforms import image, sound

#: A ramp from black to white, whose bytes are the same in each depth.
GREY = np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1))


def save(picture: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def tiff(samples: bytes, bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """Write 16 x 16 samples as an uncompressed TIFF of one channel."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 0)]
    tags += [(277, 1), (278, 16), (279, len(samples)), (339, kind)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHII", tag, 4, 1, start if tag == 273 else v) for tag, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + samples


def packed_12_bits() -> bytes:
    wide = (GREY.reshape(-1).astype(int) * 0x1010 >> 8) & 0xFFF
    return b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in wide.reshape(-1, 2).tolist()
    )


WIDE = GREY.astype(np.uint16) * 257
PICTURES = {
    "L png": save(Image.fromarray(GREY), "PNG"),
    "LA png": save(Image.fromarray(GREY).convert("LA"), "PNG"),
    "P png": save(Image.fromarray(GREY).convert("P"), "PNG"),
    "RGB png": save(Image.fromarray(GREY).convert("RGB"), "PNG"),
    "RGBA png": save(Image.fromarray(GREY).convert("RGBA"), "PNG"),
    "RGBX tiff": save(Image.fromarray(GREY).convert("RGBX"), "TIFF"),
    "CMYK tiff": save(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "TIFF"),
    "YCbCr tiff": save(Image.fromarray(GREY).convert("YCbCr"), "TIFF"),
    "16-bit png": save(Image.fromarray(WIDE), "PNG"),
    "16-bit jpeg 2000": save(Image.fromarray(WIDE), "JPEG2000", irreversible=False),
    "16-bit pgm": b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(),
    "10-bit pgm": b"P5 16 16 1023\n" + (GREY.astype(int) * 1023 // 255).astype(">u2").tobytes(),
    "8-bit tiff": tiff(GREY.tobytes(), 8),
    "8-bit tiff, 0 is white": tiff((255 - GREY).tobytes(), 8, photometric=0),
    "12-bit tiff": tiff(packed_12_bits(), 12),
    "16-bit tiff": tiff(WIDE.astype("<u2").tobytes(), 16),
    "16-bit tiff, 0 is white": tiff((65535 - WIDE).astype("<u2").tobytes(), 16, photometric=0),
}
REFUSED = {
    "32-bit tiff": (tiff(GREY.astype("<u4").tobytes(), 32), "32-bit integers"),
    "32-bit tiff, full range": (
        tiff((GREY.astype("<u4") * 0x1010101).tobytes(), 32), "32-bit integers"
    ),
    "32-bit tiff with sign": (
        save(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32-bit integers with a sign"
    ),
    "16-bit tiff with sign": (
        tiff(GREY.astype("<i2").tobytes(), 16, kind=2), "16-bit integers with a sign"
    ),
    "float tiff": (save(Image.fromarray(GREY / np.float32(255)), "TIFF"), "fractions"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image, .* Convert it to JPEG"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC image, .* Convert it to JPEG"),
    "LAB tiff": (save(Image.new("LAB", (16, 16)), "TIFF"), "LAB colours. Save it as RGB"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_each_pixel_mode_gives_the_pixels_of_the_original(kind: str) -> None:
    pixels = image.load_pixels(PICTURES[kind], 16)
    # The palette, the colour conversions and the 10 bits round.
    exact = kind not in ("P png", "YCbCr tiff", "10-bit pgm")
    assert np.abs(pixels.astype(int) - GREY[..., None]).max() <= (0 if exact else 2)


def test_black_and_white_is_read() -> None:
    pixels = image.load_pixels(save(Image.fromarray(GREY > 127), "PNG"), 16)
    assert np.array_equal(pixels[..., 0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("kind", REFUSED)
def test_pixels_without_a_defined_white_are_refused(kind: str) -> None:
    data, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=reason):
        image.load_pixels(data, 16)


def test_an_array_of_integers_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit integers"):
        image.convert_image(Image.fromarray(GREY.astype(np.int32)), 16)


#: Codec -> numpy type of its samples, and their largest value.
CODECS = {
    "pcm_u8": (np.uint8, 127.0),
    "pcm_s16le": (np.int16, 32767.0),
    "pcm_s24le": (np.int32, 2147483392.0),
    "pcm_s32le": (np.int32, 2147483392.0),
    "pcm_f32le": (np.float32, 1.0),
    "pcm_f64le": (np.float64, 1.0),
}
LAYOUTS = {"mono": 1, "stereo": 2, "2.1": 3, "quad": 4, "5.1": 6, "7.1": 8}


def wav(codec: str, layout: str) -> bytes:
    """Write a tenth of a second of a tone, the same in all channels."""
    import av

    kind, peak = CODECS[codec]
    tone = 0.25 * np.sin(np.arange(1600) * 0.1)
    samples = np.repeat(tone[:, None], LAYOUTS[layout], axis=1).reshape(1, -1) * peak
    if kind is np.uint8:
        samples = samples + 128
    target = io.BytesIO()
    with av.open(target, "w", format="wav") as container:
        stream = container.add_stream(codec, rate=16_000, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.rint(samples).astype(kind) if peak > 1 else samples.astype(kind),
            format=stream.format.name,
            layout=layout,
        )
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return target.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", CODECS)
def test_each_sample_format_and_layout_is_as_loud_as_mono(codec: str, layout: str) -> None:
    wave = sound.decode_audio(wav(codec, layout))
    tone = 0.25 * np.sin(np.arange(1600) * 0.1)
    assert wave.shape == (1600,)
    assert np.abs(wave - tone).max() < 0.01


@pytest.mark.parametrize("kind", [np.int16, np.float32, np.float64])
def test_stereo_in_memory_is_the_mean_of_its_channels(kind: type) -> None:
    peak = 32767 if kind is np.int16 else 1
    left = np.sin(np.arange(1600) * 0.1) * 0.5
    both = (np.stack([left, np.zeros(1600)], 1) * peak).astype(kind)
    assert np.abs(sound.resample_audio(both, 16_000) - left / 2).max() < 0.001
