"""A folder of media as bad as users' folders get, and corpora that read it; workers import them."""

import io
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.corpora.base import Corpus, Rejected, Row, Sources
from pipelines.guard import read_each
from pipelines.transforms import image, sound, video
from tests.clips import encode_video
from tests.unit.test_transforms import PATHS, mp3, tone, wav

HOURS = 10


def picture(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture with something on it."""
    noise = np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).save(target, kind)
    return target.getvalue()


def hundred_megapixels() -> bytes:
    """A small file that unpacks to 100 million pixels."""
    target = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(target, "PNG")
    return target.getvalue()


def ten_hours() -> bytes:
    """A small file of ten hours of silence."""
    target, samples, rate = io.BytesIO(), 65_535, 8_000
    with av.open(target, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=rate)
        stream.layout = "mono"
        silence = np.zeros((1, samples), np.int16)
        for number in range(HOURS * 3_600 * rate // samples + 1):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, number * samples
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def not_numbers() -> bytes:
    """A WAV of floats, some of which are NaN."""
    samples = tone(0.3, 16_000).astype("<f4")
    samples[2_000:2_010] = np.nan
    body = samples.tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, 3, 1,
                       16_000, 64_000, 4, 32)  # fmt: skip
    return head + struct.pack("<4sI", b"data", len(body)) + body


def clip() -> bytes:
    """A character being written, as an MP4 without sound."""
    return encode_video(video.draw_paths(PATHS))


def repacked(data: bytes, ending: str) -> bytes:
    """A video in another container, its index before its frames, so that a cut one opens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{ending}"
        with (
            av.open(io.BytesIO(data)) as source,
            av.open(str(path), "w", options={"movflags": "faststart"}) as out,
        ):
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        return path.read_bytes()


def half(data: bytes) -> bytes:
    """The first half of a file."""
    return data[: len(data) // 2]


#: Kind of corpus -> file -> (its bytes, words of the reason, "" for a good one).
FILES: dict[str, dict[str, tuple[Callable[[], bytes], str]]] = {
    "pictures": {
        "good-1.jpg": (lambda: picture("JPEG"), ""),
        "good-2.png": (lambda: picture("PNG"), ""),
        "png-called-jpg.jpg": (lambda: picture("PNG", (70, 70)), ""),
        "cut.jpg": (lambda: half(picture("JPEG")), "damaged picture"),
        "cut.png": (lambda: half(picture("PNG")), "damaged picture"),
        "sound-called-jpg.jpg": (lambda: mp3(tone(), 32_000), "not a picture"),
        "empty.jpg": (lambda: b"", "not a picture"),
        "huge.png": (hundred_megapixels, "million pixels"),
        "bomb.svg": (lambda: b"<svg" + b"<g>" * 4_000_000, "SVG of more"),
        "broken.svg": (lambda: b"<svg><rect", "damaged SVG"),
        "good-3.webp": (lambda: picture("WEBP"), ""),
    },
    "sounds": {
        "good-1.wav": (lambda: wav(tone(), 32_000), ""),
        "good-2.mp3": (lambda: mp3(tone(), 32_000), ""),
        "mp3-called-wav.wav": (lambda: mp3(tone(0.7), 32_000), ""),
        "cut.wav": (lambda: half(wav(tone(), 32_000)), "cut short"),
        "cut.mp3": (lambda: half(mp3(tone(), 32_000)), "cut short"),
        "text-called-mp3.mp3": (lambda: "这不是录音".encode() * 99, "not a recording"),
        "page.mp3": (lambda: b"<!DOCTYPE html><title>404</title>", "web page"),
        "empty.wav": (lambda: b"", "not a recording"),
        "long.flac": (ten_hours, "longer than 600 seconds"),
        "silent-film.mp4": (clip, "no sound"),
        "nan.wav": (not_numbers, "no numbers"),
        "silence.wav": (lambda: wav(np.zeros(9_000), 16_000), "silent"),
        "good-3.wav": (lambda: wav(tone(0.4), 16_000), ""),
    },
    "clips": {
        "good-1.mp4": (clip, ""),
        "good-2.mkv": (lambda: repacked(clip(), "mkv"), ""),
        "cut.mp4": (lambda: half(clip()), "not a video"),
        "cut.mkv": (lambda: half(repacked(clip(), "mkv")), "cut short"),
        "cut-after-its-index.mp4": (lambda: half(repacked(clip(), "mp4")), "cut short"),
        "good-4.mp4": (lambda: repacked(clip(), "mp4"), ""),
        "sound-called-mp4.mp4": (lambda: wav(tone(), 32_000), "no pictures"),
        "empty.mp4": (lambda: b"", "not a video"),
        "noise.mp4": (lambda: np.random.default_rng(0).bytes(9_999), "not a video"),
        "good-3.mp4": (clip, ""),
    },
}
READ: dict[str, Callable[[bytes], np.ndarray]] = {
    "pictures": image.load_pixels,
    "sounds": sound.load_log_mel,
    "clips": video.load_clip,
}


def write_files(folder: Path, kind: str) -> Path:
    """Write the files of a kind; returns the folder."""
    folder.mkdir(parents=True)
    for name, (make, _) in FILES[kind].items():
        (folder / name).write_bytes(make())
    return folder


class Hostile(Corpus):
    """The files of a folder, each a row."""

    modality = "image"
    task = "text_to_image"
    archives = ()
    raw = pa.schema([("file", pa.string()), ("row", pa.int64()), ("caption", pa.string())])
    columns = pa.schema([("sum", pa.float64()), ("caption", pa.string())])
    shard_rows = 6
    kind: ClassVar[str]

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """The files by name, then rows that are bad before any file is read."""
        files = sorted(sources.directory.iterdir())
        for number, path in enumerate(files, start=1):
            place = {"file": str(path), "row": number}
            yield {"split": "train", "key": path.name, "group": -1, "caption": "好", **place}
        first = {"split": "train", "group": -1, "file": str(files[0])}
        number = len(files)
        yield first | {"key": files[0].name, "caption": "好", "row": number + 1}
        yield first | {"key": "caption of 10 MB", "caption": "长" * 10_000_000, "row": number + 2}
        yield first | {"key": "bytes \udcff", "caption": "好", "row": number + 3}
        yield first | {"key": "no text", "caption": 7.5, "row": number + 4}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """The sum over all values of the decoded file."""
        sums, reasons = [], []
        for total, reason in read_each(block["file"].to_pylist(), self.read):
            sums.append(total)
            reasons.append(reason)
        return pa.table(
            {
                "sum": pa.array(sums, pa.float64()),
                "caption": block["caption"],
                "rejected": pa.array(reasons, pa.string()),
            }
        )

    def read(self, name: str) -> float:
        """Decode a file."""
        return float(READ[self.kind](Path(name).read_bytes()).sum(dtype=np.float64))

    def preprocessing(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {}


class Pictures(Hostile):
    """Pictures."""

    name = kind = "pictures"


class Sounds(Hostile):
    """Recordings."""

    name = kind = "sounds"


class Clips(Hostile):
    """Videos."""

    name = kind = "clips"


class Deadly(Hostile):
    """Twenty rows: one whose decoder hangs where no signal reaches it, one whose crashes."""

    name = "deadly"

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Numbers as names of files."""
        for number in range(20):
            place = {"file": str(number), "row": number + 1}
            yield {"split": "train", "key": str(number), "group": -1, "caption": "好", **place}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """As above, with half a second for a row."""
        found = list(read_each(block["file"].to_pylist(), self.read, seconds=0.5))
        return pa.table(
            {
                "sum": pa.array([total for total, _ in found], pa.float64()),
                "caption": block["caption"],
                "rejected": pa.array([reason for _, reason in found], pa.string()),
            }
        )

    def read(self, name: str) -> float:
        """Hang, crash, take too long, or work."""
        if name == "4":
            return float(sum(range(10**12)))  # in C, all the time
        if name == "9":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "13":
            while True:
                pass
        return float(name)
