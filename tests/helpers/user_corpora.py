"""Small corpora in the layouts that users have on disk: TNEWS, AISHELL-1, AIC-ICC, VATEX …

Recordings are the built-in ones where their archive is at hand (``runs/archives`` of a checkout),
else tones; pictures and clips are drawn; all are real files: wav, jpg, mp4, gz, tar.
"""

import gzip
import io
import json
import tarfile
import wave
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.transforms import sound
from skillnet_corpora.archives import iter_members
from skillnet_corpora.demo.strokes import draw_pen_paths
from skillnet_corpora.paper import LABELS
from tests.helpers.archive_files import tarred
from tests.helpers.readable_corpora import COLOURS, ENDINGS, NOUNS, SHAPES, STROKES, VERBS
from tests.helpers.video_files import encode_video

ARCHIVE = Path(__file__).parents[2] / "runs" / "archives" / "cnchar-data-1.1.0.tgz"
SPOKEN = "广州市房地产中介协会分析今天天气好一二三四五六七八九十"


def wav(number: int, rate: int = 16_000) -> bytes:
    """A recording as a wav file: a real one where there is the archive, else gliding tones."""
    real = _recordings()
    if real:
        samples = np.tile(real[number % len(real)], 2)
    else:
        time = np.arange(int(0.9 * rate)) / rate
        glide = np.sin(2 * np.pi * (200 + 40 * number) * time * (1 + time / 4))
        samples = (0.3 * glide * np.hanning(time.size)).astype(np.float32)
    target = io.BytesIO()
    with wave.open(target, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes((samples * 30_000).astype("<i2").tobytes())
    return target.getvalue()


@cache
def _recordings() -> tuple[np.ndarray, ...]:
    """A few of the built-in recordings."""
    if not ARCHIVE.is_file():
        return ()
    names = {f"package/voice/{name}.mp3" for name in ("ba1", "ma3", "shi4", "zhuang1", "guo2")}
    found = iter_members(ARCHIVE, lambda name: name in names)
    return tuple(sound.decode_audio(data) for _, data in found)


def jpg(number: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """A drawn picture as a JPEG file."""
    from PIL import Image, ImageDraw

    colour, shape = _drawing(number)
    picture = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(picture)
    box = (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4)
    draw = pen.ellipse if shape == "圆圈" else pen.rectangle
    draw(box, fill=COLOURS[colour])
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=90)
    return target.getvalue()


def mp4(number: int, frames: int = 12) -> bytes:
    """A clip of strokes being drawn as an mp4 file."""
    paths = [STROKES[name] for name in _strokes(number)]
    return encode_video(draw_pen_paths(paths, frames, 48))


def _drawing(number: int) -> tuple[str, str]:
    every = list(product(COLOURS, SHAPES))
    return every[number % len(every)]


def _strokes(number: int) -> tuple[str, ...]:
    every = list(product(STROKES, repeat=3))
    return every[number % len(every)]


def write_lines(path: Path, rows: list[Any]) -> None:
    """JSON lines; compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def tnews(folder: Path, train: int = 60, other: int = 15) -> Path:
    """TNEWS: the label is an int and ``label_des`` stands for ``label_desc`` in some lines."""
    codes = list(LABELS)
    for name, rows in (("train", train), ("dev", other), ("test", other)):
        lines = []
        for number in range(rows):
            code, ending = codes[number % 15], ENDINGS[number % len(ENDINGS)]
            text = {"sentence": f"{LABELS[code]}的新闻{ending}{number}", "keywords": ending}
            label: dict[str, Any] = {"label": code, "label_desc": LABELS[code]}
            if number % 2:
                label = {"label": int(code), "label_des": LABELS[code]}
            lines.append({"id": number} | text if name == "test" else label | text)
        write_lines(folder / f"{name}.json", lines)
    write_lines(folder / "labels.json", [{"label": c, "label_desc": d} for c, d in LABELS.items()])
    return folder


def aishell1(folder: Path, utterances: int = 4) -> Path:
    """AISHELL-1: of four training speakers one is a tar.gz in its split, one beside the splits."""
    root = folder / "data_aishell"
    lines = []
    speakers = [("train", n) for n in range(2, 6)] + [("dev", 724), ("test", 764)]
    for place, (split, number) in enumerate(speakers):
        speaker = f"S{number:04d}"
        files = {}
        for each in range(utterances):
            name = f"BAC009{speaker}W{122 + each:04d}"
            files[f"{name}.wav"] = wav(place * utterances + each)
            start = (3 * each + place) % (len(SPOKEN) - 4)
            words = " ".join([SPOKEN[start : start + 2], SPOKEN[start + 2 : start + 3]])
            lines.append(f"{name} {words}")
        if place == 1:
            packed = tarred({f"{speaker}/{name}": data for name, data in files.items()})
            (root / "wav" / split).mkdir(parents=True, exist_ok=True)
            (root / "wav" / split / f"{speaker}.tar.gz").write_bytes(packed)
        elif place == 2:
            packed = tarred({f"./{split}/{speaker}/{n}": data for n, data in files.items()})
            (root / "wav" / f"{speaker}.tar.gz").write_bytes(packed)
        else:
            home = root / "wav" / split / speaker
            home.mkdir(parents=True)
            for name, data in files.items():
                (home / name).write_bytes(data)
    lines.remove(next(line for line in lines if line.startswith("BAC009S0002W0123")))
    lines.append("BAC009S0003W0999 没有 录音")
    (root / "transcript").mkdir()
    text = "\n".join(sorted(lines)) + "\n"
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text(text, encoding="utf-8")
    return folder


def aic_icc(folder: Path, train: int = 12, other: int = 5) -> Path:
    """AIC-ICC: train, validation, tests a and b; one picture missing, one without captions."""
    parts = [("train", "20170902", train), ("validation", "20170910", other)]
    parts += [("test_a", "20180103", other), ("test_b", "20180103", other)]
    first = 0
    for part, date, rows in parts:
        home = folder / f"ai_challenger_caption_{part}_{date}"
        images = home / f"caption_{part}_images_{date}"
        images.mkdir(parents=True)
        records = []
        for number in range(first, first + rows):
            name = f"{number:040x}.jpg"
            (images / name).write_bytes(jpg(number))
            colour, shape = _drawing(number)
            captions = [f"{colour}的{shape}", f"一个{colour}{shape}", colour, shape, "一张图"]
            captions[0] += str(number)
            records.append({"url": "http://x/1", "image_id": name, "caption": captions})
        first += rows
        if part == "train":
            (images / records[0]["image_id"]).unlink()
            (images / f"{'f' * 40}.jpg").write_bytes(jpg(1))
        text = json.dumps(records, ensure_ascii=False)
        (home / f"caption_{part}_annotations_{date}.json").write_text(text, encoding="utf-8")
    return folder


def vatex(folder: Path, merged: bool = False, train: int = 10, other: int = 8) -> Path:
    """VATEX: an array or an object of records; clips in two folders; ids with _ and -."""
    parts = [("training_v1.0", train, True), ("validation_v1.0", other, True)]
    parts += [("public_test_english_v1.1", other, False)]
    first = 0
    for part, rows, chinese in parts:
        records = []
        for number in range(first, first + rows):
            name = f"-a_{number:02d}-{'x' * 5}_{number:06d}_{number + 10:06d}"
            home = folder / ("clips/a" if number % 2 else "more")
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{name}.mp4").write_bytes(mp4(number))
            said = "、".join(_strokes(number))
            record = {"videoID": name, "enCap": [f"clip {number} take {n}" for n in range(10)]}
            if chinese:
                record["chCap"] = [f"写{said}第{n}遍" for n in range(10)]
            records.append(record)
        first += rows
        shown: Any = records
        if merged:
            shown = {record.pop("videoID"): record for record in records}
        text = json.dumps(shown, ensure_ascii=False)
        (folder / f"vatex_{part}.json").write_text(text, encoding="utf-8")
    (folder / "more" / "nobody_000001_000011.mp4").write_bytes(mp4(1))
    min((folder / "clips" / "a").iterdir()).unlink()
    return folder


def code_rows(count: int, first: int = 0, pytorrent: bool = False) -> list[dict[str, Any]]:
    """Lines of CodeSearchNet or PyTorrent, docstring inside the code as they have it."""
    every = list(product(VERBS.items(), NOUNS.items()))
    rows = []
    for number in range(first, first + count):
        (said, verb), (thing, noun) = every[number % len(every)]
        docstring = f"{said}{thing}{number}的函数，见 https://example.org/x\n\n更多说明。"
        code = (
            f'def {verb}_{noun}_{number}({noun}):\n    """{docstring}\n    """\n'
            f"    return client.{verb}({noun}, {number})\n"
        )
        row: dict[str, Any] = {
            "repo": "a/b", "path": "a/b.py", "func_name": f"{verb}_{noun}_{number}",
            "original_string": code, "code": code, "code_tokens": [], "docstring": docstring,
            "docstring_tokens": [], "language": "python", "sha": "0", "url": "", "partition": "",
        }  # fmt: skip
        if pytorrent:
            row |= {"code_with_docstrings": code, "summary": docstring}
            row |= {"docstring_zh": f"{said}一个{thing}"}
        rows.append(row)
    return rows


def pytorrent(folder: Path, train: int = 12, other: int = 5) -> Path:
    """PyTorrent: ``both/{train,valid,test}/*.jsonl.gz``."""
    for place, (split, rows) in enumerate((("train", train), ("valid", other), ("test", other))):
        lines = code_rows(rows, place * 100, pytorrent=True)
        write_lines(folder / "both" / split / f"python_{split}_0.jsonl.gz", lines)
    return folder


def codesearchnet(folder: Path, train: int = 12, other: int = 5) -> Path:
    """CodeSearchNet: ``python/final/jsonl/{train,valid,test}/python_{split}_N.jsonl.gz``."""
    for place, (split, rows) in enumerate((("train", train), ("valid", other), ("test", other))):
        for part in range(2):
            lines = code_rows(rows // 2 + 1, place * 100 + part * 50)
            home = folder / "python" / "final" / "jsonl" / split
            write_lines(home / f"python_{split}_{part}.jsonl.gz", lines)
    return folder


def webdataset(folder: Path, rows: int = 12) -> Path:
    """Tars of pictures with captions, for training and for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, split in enumerate(("train-000000", "train-000001", "test-000000")):
        with tarfile.open(folder / f"{split}.tar", "w") as out:
            for number in range(place * rows, (place + 1) * rows):
                colour, shape = _drawing(number)
                texts = {"jpg": jpg(number), "txt": f"{colour}的{shape}{number}".encode()}
                for ending, data in texts.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                    entry.size = len(data)
                    out.addfile(entry, io.BytesIO(data))
    return folder


def media_folder(folder: Path, rows: int = 12) -> Path:
    """Recordings with ``metadata.jsonl`` in the "audiofolder" convention, by three speakers."""
    (folder / "data").mkdir(parents=True)
    lines = []
    for number in range(rows):
        (folder / "data" / f"{number}.wav").write_bytes(wav(number))
        text = SPOKEN[number : number + 3]
        lines.append(
            {"file_name": f"data/{number}.wav", "transcription": text, "speaker": f"s{number % 3}"}
        )
    write_lines(folder / "metadata.jsonl", lines)
    return folder
