"""Rows of the built-in corpora in the layouts of the paper's corpora, with media of their sizes.

    python -m benchmarks.paper_corpora FOLDER --rows 60 --archives runs/archives

writes below FOLDER

* tnews: titles of subjects, as JSON lines;
* aishell1: syllables one after the other, 2 to 20 s, 16 kHz mono, as WAV by speaker;
* aic_icc: drawings on a coloured ground, 640 x 480, as JPEG with five captions;
* vatex: characters being written in colour, ten seconds of 320 x 240, as MP4 with ten captions;
* pytorrent: functions and their docstrings, as compressed JSON lines.

Of each, ROWS rows train, and a sixth of them validate and test each.
"""

import argparse
import gzip
import io
import json
import sys
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.media_corpus import encode_mp4
from pipelines.data.corpora import find_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.transforms import sound
from pipelines.data.transforms.image import decode_image
from skillnet_corpora.demo.strokes import _paths, draw_pen_paths
from skillnet_corpora.paper import LABELS
from skillnet_platform import storage

#: Parts of a corpus; the second number divides the rows of the first part.
PARTS = {"train": 1, "validation": 6, "test": 6}
#: Seconds of an utterance; the first one of a part is the longest.
SHORTEST, LONGEST = 2.0, 19.8
#: Pixels of photographs and films, and frames of a film.
PHOTOGRAPH, FILM, FILM_FRAMES = (640, 480), (320, 240), 100
#: Recordings of the training split that utterances are made of.
RECORDINGS = 200

Rows = Mapping[str, list[dict[str, Any]]]


def make_corpora(folder: Path, rows: int, archives: Path) -> None:
    """Write all five corpora.

    Args:
        folder: directory of the corpora.
        rows: that train; see ``PARTS``.
        archives: directory of the downloads.
    """
    write_tnews(folder / "tnews", _first_rows("headings", rows, archives))
    write_aishell(folder / "aishell1", _first_rows("syllables", RECORDINGS, archives), rows)
    write_aic_icc(folder / "aic_icc", _first_rows("drawings", rows, archives))
    write_vatex(folder / "vatex", _first_rows("strokes", rows, archives))
    write_pytorrent(folder / "pytorrent", _first_rows("functions", rows, archives))


def write_tnews(folder: Path, rows: Rows) -> None:
    """Write titles as TNEWS."""
    codes = list(LABELS)
    for part, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        lines = [
            {
                "label": codes[row["label"]],
                "label_desc": LABELS[codes[row["label"]]],
                "sentence": row["text"],
                "keywords": "",
            }
            for row in rows[part]
        ]
        _write_lines(folder / f"{name}.json", lines)


def write_aishell(folder: Path, rows: Rows, count: int) -> None:
    """Write utterances of recorded syllables as AISHELL-1, one speaker a part."""
    root, lines, random = folder / "data_aishell", [], np.random.default_rng(0)
    spoken = [
        (row["text"], sound.decode_audio(row["audio"])) for part in PARTS for row in rows[part]
    ]
    names = {"train": "train", "validation": "dev", "test": "test"}
    for speaker, (part, divisor) in enumerate(PARTS.items(), 2):
        home = root / "wav" / names[part] / f"S{speaker:04d}"
        home.mkdir(parents=True)
        for number in range(-(-count // divisor)):
            seconds = LONGEST if not number else float(random.uniform(SHORTEST, LONGEST))
            words, samples = _speak(spoken, seconds, random)
            name = f"BAC009S{speaker:04d}W{number:04d}"
            (home / f"{name}.wav").write_bytes(_encode_wav(samples))
            lines.append(f"{name} {' '.join(words)}\n")
    (root / "transcript").mkdir()
    path = root / "transcript" / "aishell_transcript_v0.8.txt"
    path.write_text("".join(lines), encoding="utf-8")


def write_aic_icc(folder: Path, rows: Rows) -> None:
    """Write drawings as the photographs of AIC-ICC."""
    random = np.random.default_rng(1)
    dates = {"train": "train_20170902", "validation": "validation_20170910"}
    for part, date in (dates | {"test": "test_a_20180103"}).items():
        name, day = date.rsplit("_", 1)
        home = folder / f"ai_challenger_caption_{date}"
        images = home / f"caption_{name}_images_{day}"
        images.mkdir(parents=True)
        records = []
        for number, row in enumerate(rows[part]):
            file = f"{number:040x}.jpg"
            (images / file).write_bytes(_photograph(row["image"], random))
            captions = [row["captions"][n % len(row["captions"])] for n in range(5)]
            records.append({"url": "", "image_id": file, "caption": captions})
        text = json.dumps(records, ensure_ascii=False)
        (home / f"caption_{name}_annotations_{day}.json").write_text(text, encoding="utf-8")


def write_vatex(folder: Path, rows: Rows) -> None:
    """Write characters being written as the films of VATEX."""
    random, first = np.random.default_rng(2), 0
    (folder / "clips").mkdir(parents=True)
    files = {"train": "training_v1.0", "validation": "validation_v1.0"}
    parts = {"train": rows["train"], "validation": rows["validation"] + rows["test"]}
    for part, name in files.items():
        records = []
        for number, row in enumerate(parts[part], first):
            film = f"stroke{number:05d}_000000_000010"
            paths = _paths(row["points"], row["counts"])
            (folder / "clips" / f"{film}.mp4").write_bytes(_film(paths, random))
            said = [f"写{row['captions'][0]}第{take}遍" for take in range(10)]
            records.append({"videoID": film, "chCap": said, "enCap": [row["key"]] * 10})
        first += len(records)
        text = json.dumps(records, ensure_ascii=False)
        (folder / f"vatex_{name}.json").write_text(text, encoding="utf-8")


def write_pytorrent(folder: Path, rows: Rows) -> None:
    """Write functions as PyTorrent."""
    for part, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        lines = [
            {
                "repo": row["package"],
                "path": row["module"],
                "func_name": row["key"],
                "original_string": row["code"],
                "code": row["code"],
                "code_with_docstrings": row["code"],
                "docstring": row["captions"][0],
                "summary": row["captions"][0],
                "language": "python",
            }
            for row in rows[part]
        ]
        _write_lines(folder / "both" / name / f"python_{name}_0.jsonl.gz", lines)


def _first_rows(name: str, count: int, archives: Path) -> Rows:
    """Return part -> its first rows with annotations."""
    corpus = find_corpus(name)
    wanted = {part: -(-count // divisor) for part, divisor in PARTS.items()}
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for row in corpus.rows(SourceArchives(archives, corpus.archives)):
        if not isinstance(row, dict) or row["split"] not in found:
            continue
        part = found[row["split"]]
        if len(part) < wanted[row["split"]]:
            part.append(row)
        elif all(len(found[each]) == wanted[each] for each in PARTS):
            break
    return found


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _speak(
    spoken: list[tuple[str, np.ndarray]], seconds: float, random: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    """Return syllables and the samples of them, as many as fit into the time."""
    words: list[str] = []
    parts: list[np.ndarray] = []
    left = int(seconds * sound.RATE)
    while True:
        word, samples = spoken[int(random.integers(len(spoken)))]
        pause = int(random.integers(sound.RATE // 10, sound.RATE // 4))
        if samples.size + pause > left and words:
            return words, np.concatenate(parts)
        words.append(word)
        parts += [samples[:left], np.zeros(max(min(pause, left - samples.size), 0), np.float32)]
        left -= samples.size + pause


def _encode_wav(samples: np.ndarray) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, sound.RATE, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32_000).astype("<i2").tobytes())
    return target.getvalue()


def _photograph(drawing: bytes, random: np.random.Generator) -> bytes:
    """Return a JPEG of a drawing, turned, on a ground of two colours."""
    width, height = PHOTOGRAPH
    low, high = random.integers(0, 256, (2, 3))
    shade = np.linspace(0, 1, height)[:, None, None]
    ground = np.broadcast_to(low + shade * (high - low), (height, width, 3))
    canvas = Image.fromarray(ground.astype(np.uint8))
    side = int(random.integers(height // 2, height))
    front = decode_image(drawing, side).convert("RGBA").resize((side, side))
    front = front.rotate(float(random.uniform(-30, 30)))
    place = (int(random.integers(width - side)), int(random.integers(height - side)))
    canvas.paste(front, place, front)
    target = io.BytesIO()
    canvas.save(target, "JPEG", quality=92)
    return target.getvalue()


def _film(paths: list[Any], random: np.random.Generator) -> bytes:
    """Return an MP4 of pen paths being drawn, in a colour on another one."""
    width, height = FILM
    ink, paper = random.integers(128, 256, 3), random.integers(0, 128, 3)
    drawn = draw_pen_paths(paths, FILM_FRAMES, height // 4).repeat(4, 1).repeat(4, 2)

    def frames() -> Iterator[np.ndarray]:
        left = (width - height) // 2
        for frame in drawn:
            pixels = np.broadcast_to(paper, (height, width, 3)).copy()
            pixels[:, left : left + height] = paper + frame / 255 * (ink - paper)
            yield pixels.astype(np.uint8)

    return encode_mp4(frames(), width, height)


def main(argv: list[str] | None = None) -> int:
    """Write the corpora; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--archives", type=Path, default=storage.archive_root())
    given = parser.parse_args(argv)
    make_corpora(given.folder, given.rows, given.archives)
    return 0


if __name__ == "__main__":
    sys.exit(main())
