"""Folders of media and texts as bad as users' folders get, and a corpus that ends its workers."""

import io
import json
import os
import re
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.data.corpora.base import Corpus, RejectedRow, Row, SourceArchives
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_corpora.demo.strokes import draw_pen_paths
from tests.helpers.video_files import encode_video
from tests.unit.pipelines.data.transforms.test_transforms import PATHS, encoded, mp3, tone, wav

HOURS = 10

#: 300 bytes that resvg draws for minutes, holding Python's lock.
SLOW_SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="2000" height="2000"><filter id="f">'
    + b'<feTurbulence baseFrequency="0.9" numOctaves="2000000"/>'
    + b'</filter><rect width="2000" height="2000" filter="url(#f)"/></svg>'
)


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
    return encode_video(draw_pen_paths(PATHS))


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


def unknown_codec() -> bytes:
    """A video of a codec that nobody has."""
    name = rb"V_[A-Z0-9/]+"
    return re.sub(name, lambda found: b"V_".ljust(len(found[0]), b"Z"), repacked(clip(), "mkv"))


def refers() -> bytes:
    """A drawing that shows the picture beside it."""
    return (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48">'
        b'<image width="64" height="48" href="good-2.png"/></svg>'
    )


def fractions() -> bytes:
    """Greys between 0 and 1."""
    target = io.BytesIO()
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(target, "TIFF")
    return target.getvalue()


def half(data: bytes) -> bytes:
    """The first half of a file."""
    return data[: len(data) // 2]


#: Kind of corpus -> file -> (its bytes, words of the reason, "" for a good one).
FILES: dict[str, dict[str, tuple[Callable[[], bytes], str]]] = {
    "pictures": {
        "good-1.jpg": (lambda: picture("JPEG"), ""),
        "good-2.png": (lambda: picture("PNG"), ""),
        "png-called-jpg.jpg": (lambda: picture("PNG", (70, 70)), ""),
        "cut.jpg": (lambda: half(picture("JPEG")), "damaged image"),
        "cut.png": (lambda: half(picture("PNG")), "damaged image"),
        "sound-called-jpg.jpg": (lambda: mp3(tone(), 32_000), "not an image"),
        "empty.jpg": (lambda: b"", "an empty file"),
        "huge.png": (hundred_megapixels, "million pixels"),
        "bomb.svg": (lambda: b"<svg" + b"<g>" * 4_000_000, "SVG of more"),
        "broken.svg": (lambda: b"<svg><rect", "damaged SVG"),
        "refers.svg": (refers, "refers to another file"),
        "fractions.tif": (fractions, "fractions"),
        "good-3.webp": (lambda: picture("WEBP"), ""),
    },
    "sounds": {
        "good-1.wav": (lambda: wav(tone(), 32_000), ""),
        "good-2.mp3": (lambda: mp3(tone(), 32_000), ""),
        "mp3-called-wav.wav": (lambda: mp3(tone(0.7), 32_000), ""),
        "cut.wav": (lambda: half(wav(tone(), 32_000)), "cut short"),
        "cut.mp3": (lambda: half(mp3(tone(), 32_000)), "cut short"),
        "cut.opus": (lambda: half(encoded(tone(), 48_000, "ogg", "libopus")), "cut short"),
        "text-called-mp3.mp3": (lambda: "这不是录音".encode() * 99, "not audio"),
        "page.mp3": (lambda: b"<!DOCTYPE html><title>404</title>", "web page"),
        "empty.wav": (lambda: b"", "an empty file"),
        "list.mp3": (lambda: b"ffconcat version 1.0\nfile 'good-2.mp3'\n", "a playlist"),
        "long.flac": (ten_hours, "longer than 600 seconds"),
        "silent-film.mp4": (clip, "no sound"),
        "nan.wav": (not_numbers, "not finite"),
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
        "sound-called-mp4.mp4": (lambda: wav(tone(), 32_000), "no video"),
        "empty.mp4": (lambda: b"", "an empty file"),
        "unknown-codec.mkv": (unknown_codec, "codec that FFmpeg does not know"),
        "noise.mp4": (lambda: np.random.default_rng(0).bytes(9_999), "not a video"),
        "good-3.mp4": (clip, ""),
    },
}
#: The field that says what is in a file, and what it says of those whose words are no use.
FIELDS = {"pictures": "caption", "sounds": "transcription", "clips": "caption", "texts": "text"}
WORDLESS = {"pictures": "no caption", "sounds": "a text is missing", "clips": "no caption",
            "texts": "a text is missing"}  # fmt: skip
OUTSIDE = "outside.jpg"


def lines(kind: str) -> list[tuple[bytes, str]]:
    """(Line, words of the reason, "" for a good one) that are bad for any file they name."""
    field = FIELDS[kind]
    good = good_file(kind)

    def line(words: Any, name: str = good, **more: Any) -> bytes:
        about = {"label": "好"} if kind == "texts" else {"file_name": name}
        return json.dumps(about | {field: words} | more).encode() + b"\n"

    found = [
        (line("长" * 3_400_000), "longer than 1000000 characters"),
        (line("好").replace(b'\\u597d"}', b'\xff\xfe"}'), "not UTF-8"),
        (line("\ud83d"), "not UTF-8"),
        (line(7.5), WORDLESS[kind]),
        (line("好").replace(b"{", b'{"%s": "x", ' % field.encode()), "twice"),
        (line("好")[:-9] + b"\n", "not JSON"),
        (b"[1, 2]\n", "not a JSON object"),
    ]
    if kind != "texts":
        found += [
            (line("好", "/etc/hostname"), "leads out"),
            (line("好", f"../{OUTSIDE}"), "leads out"),
            (line("好", f"a/../../{OUTSIDE}"), "leads out"),
            (line("好", "none.jpg"), "missing"),
            (line("好", "."), "not a regular file"),
            (line("好", "\udcff.jpg"), "missing"),
            (line("好", "\0.jpg"), "null character"),
        ]
    # A file of its own: captions of one file would be joined.
    return [*found, (line("最后", last_file(kind)), "")]


def good_file(kind: str) -> str:
    """Name of the first file that can be decoded, "" for texts."""
    return next((name for name, (_, why) in FILES.get(kind, {}).items() if not why), "")


def last_file(kind: str) -> str:
    """Name of a copy of the good file, which the last row names."""
    return f"last{Path(good_file(kind)).suffix}"


def write_corpus(folder: Path, kind: str, cut: bool = True) -> list[str]:
    """A folder as users have them: metadata.jsonl, and beside it the files that it names.

    Args:
        folder: made.
        kind: category of the files.
        cut: the metadata end in the midst of a line.

    Returns:
        Words of the rejection reason of each row, "" for a good one.
    """
    folder.mkdir(parents=True)
    (folder.parent / OUTSIDE).write_bytes(picture("JPEG"))
    written: list[tuple[bytes, str]] = []
    for number, (name, (make, why)) in enumerate(sorted(FILES.get(kind, {}).items())):
        (folder / name).write_bytes(make())
        row = {"file_name": name, FIELDS[kind]: f"第{number}个"}
        written.append((json.dumps(row).encode() + b"\n", why))
    if kind != "texts":
        shutil.copy(folder / good_file(kind), folder / last_file(kind))
    if kind == "texts":
        good = ({"text": f"第{number}条新闻", "label": "好坏"[number % 2]} for number in range(9))
        written += [(json.dumps(row).encode() + b"\n", "") for row in good]
    written += lines(kind)
    if cut:
        written.append((written[0][0][:-9], "cut short in the middle of a line"))
    (folder / "metadata.jsonl").write_bytes(b"".join(line for line, _ in written))
    return [why for _, why in written]


class Deadly(Corpus):
    """Twenty rows: one whose decoder hangs where no signal reaches it, one whose crashes."""

    name = "deadly"
    modality = "image"
    task = "text_to_image"
    archives = ()
    raw_schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("caption", pa.string())])
    columns = pa.schema([("sum", pa.float64()), ("caption", pa.string())])
    shard_rows = 6

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Numbers as names of files."""
        for number in range(20):
            place = {"file": str(number), "row": number + 1}
            yield {"split": "train", "key": str(number), "group": -1, "caption": "好", **place}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """What ``read`` gives, with half a second for a row."""
        found = list(decode_each(block["file"].to_pylist(), self.read, seconds=0.5))
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

    def preprocessing(self) -> dict[str, Any]:
        """Nothing to choose."""
        return {}
