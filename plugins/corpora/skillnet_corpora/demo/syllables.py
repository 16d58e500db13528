"""Corpus ``syllables``: Mandarin syllables of one speaker, to recognise initial, final and tone.

63 files of the archive are saved "404 Not Found" pages with an mp3 name; their content reveals
them. Names with v repeat those with ü, and "tone 5" is tone 1 squeezed in time. For every syllable
one tone is held out for the test. So every syllable of the test occurs in training, but no pair of
syllable and tone does.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipelines.data.corpora.base import (
    Archive,
    Corpus,
    RejectedRow,
    Row,
    SourceArchives,
    stable_hash,
)
from pipelines.data.transforms import sound
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_corpora.archives import iter_archive
from skillnet_corpora.demo import CNCHAR_DATA

#: One syllable in VALIDATION_EVERY gives a second tone to validation.
VALIDATION_EVERY = 4
WEB_PAGE = "not a recording: a saved web page"

INITIALS = [*"bpmfdtnlgkhjqxrzcs", "zh", "ch", "sh"]
FINALS = [
    "a", "o", "e", "ai", "ei", "ao", "ou", "an", "en", "ang", "eng", "ong", "er",
    "i", "ia", "ie", "iao", "iou", "ian", "in", "iang", "ing", "iong",
    "u", "ua", "uo", "uai", "uei", "uan", "uen", "uang", "ueng",
    "ü", "üe", "üan", "ün",
]  # fmt: skip
TONES = ["1", "2", "3", "4"]
#: CTC targets 1 … 61 by position; 0 is the blank.
SYMBOLS = [*INITIALS, *FINALS, *TONES]
_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS, start=1)}
#: Finals that pinyin abbreviates after an initial.
_SHORT = {"iu": "iou", "ui": "uei", "un": "uen"}


class SyllablesCorpus(Corpus):
    """Audio of syllables with their symbols."""

    name = "syllables"
    modality = "sound"
    task = "speech_recognition"
    archives: ClassVar[tuple[Archive, ...]] = (CNCHAR_DATA,)
    raw_schema = pa.schema([("text", pa.string()), ("audio", pa.binary())])
    columns = pa.schema(
        [
            pa.field(
                "log_mel",
                pa.list_(pa.list_(pa.float32(), sound.MELS)),
                metadata={b"shape": f"[-1,{sound.MELS}]".encode()},
            ),
            pa.field("frames", pa.int32()),
            pa.field("symbols", pa.list_(pa.int32())),
            pa.field("text", pa.string()),
        ]
    )
    #: The archive has no other audio, so pretraining reads the training split only.
    pretraining = ("train",)
    shard_rows = 256

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield syllables in the order of the archive."""
        files = dict(iter_archive(sources, "cnchar-data", "package/voice/", ".mp3"))
        reasons = {name: reason for name in files if (reason := _reject(name, files))}
        split = _split([name for name in files if name not in reasons])
        for name, data in files.items():
            if name in reasons:
                yield RejectedRow(f"{name}.mp3", reasons[name])
            else:
                row = {"split": split[name], "key": f"{name}.mp3", "group": -1}
                yield {**row, "text": name, "audio": data}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return log-mel frames; a file that cannot be decoded is rejected."""
        names = block["text"].to_pylist()
        symbols = pa.array([encode_symbols(name) for name in names], pa.list_(pa.int32()))
        mels, frames, rejected = hear_recordings(block)
        return pa.table(
            {
                "log_mel": mels,
                "frames": frames,
                "symbols": symbols,
                "text": block["text"],
                "rejected": rejected,
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the parameters of the frames and of the split."""
        return describe_frames() | {
            "validation_every": VALIDATION_EVERY,
            "split_by": "one tone of each syllable",
        }

    def facts(self) -> dict[str, Any]:
        """Return the names of the symbols; the first one has the id 1."""
        return {"symbols": list(SYMBOLS), "blank": 0}


def hear_recordings(block: pa.Table) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return log-mel frames and lengths of the column ``audio``, and the reasons of rejected rows.

    Args:
        block: raw rows.
    """
    mels: list[np.ndarray] = []
    rejected: list[str | None] = []
    empty = np.zeros((0, sound.MELS), np.float32)
    for mel, reason in decode_each(block["audio"], lambda x: sound.load_log_mel(x.as_py())):
        # An empty placeholder keeps the rows aligned.
        mels.append(empty if mel is None else mel)
        rejected.append(reason)
    frames = [len(mel) for mel in mels]
    flat = pa.array(np.concatenate(mels).reshape(-1))
    per_frame = pa.FixedSizeListArray.from_arrays(flat, sound.MELS)
    ends = pa.array(np.concatenate([[0], np.cumsum(frames)]).astype(np.int32))
    log_mel = pa.ListArray.from_arrays(ends, per_frame)
    return log_mel, pa.array(frames, pa.int32()), pa.array(rejected, pa.string())


def describe_frames() -> dict[str, Any]:
    """Return the parameters of the log-mel frames."""
    return {
        "rate": sound.RATE,
        "window": sound.WINDOW,
        "hop": sound.HOP,
        "fft": sound.FFT,
        "mels": sound.MELS,
        "band": [sound.LOW, sound.HIGH],
        "emphasis": sound.EMPHASIS,
        "trim_db": sound.TRIM_DB,
        "level": sound.LEVEL,
        "floor": sound.FLOOR,
        "mean": sound.MEAN,
        "deviation": sound.DEVIATION,
        "max_frames": sound.MAX_FRAMES,
    }


def split_pinyin(pinyin: str) -> list[str]:
    """Split pinyin into initial (if any), final and tone: "zhuang1" -> ["zh", "uang", "1"].

    Raises:
        ValueError: the text is not a syllable of standard Mandarin with a tone from 1 to 4.
    """
    found = re.fullmatch(r"([a-zü]+)([1-4])", pinyin)
    if found is None:
        raise ValueError(f"{pinyin!r} is not pinyin with a tone from 1 to 4")
    letters, tone = found.groups()
    initial, final = _parts(letters)
    if final not in FINALS:
        raise ValueError(f"{pinyin!r} has no final of standard Mandarin")
    return [*([initial] if initial else []), final, tone]


def join_pinyin(symbols: Sequence[str]) -> str:
    """Return the pinyin of initial (if any), final and tone; the inverse of :func:`split_pinyin`.

    Args:
        symbols: two or three of ``SYMBOLS``, such as ("zh", "uang", "1").
    """
    *initial, final, tone = symbols
    if initial:
        letters = {full: short for short, full in _SHORT.items()}.get(final, final)
        if initial[0] in ("j", "q", "x"):
            letters = letters.replace("ü", "u")
    elif final in ("i", "in", "ing"):
        letters = "y" + final
    elif final == "u":
        letters = "wu"
    elif final.startswith("ü"):
        letters = "yu" + final[1:]
    else:
        # A vowel i or u before another vowel is written as a consonant.
        letters = {"i": "y", "u": "w"}.get(final[0], final[0]) + final[1:]
    return "".join(initial) + letters + tone


def encode_symbols(pinyin: str) -> list[int]:
    """Return the CTC targets of a syllable; ids start at 1.

    Raises:
        ValueError: see ``split_pinyin``.
    """
    return [_NUMBER[symbol] for symbol in split_pinyin(pinyin)]


def _parts(letters: str) -> tuple[str, str]:
    # y and w replace i and u at the start of a syllable without initial.
    if letters[0] == "y":
        rest = letters[1:]
        if rest.startswith("u"):
            return "", "ü" + rest[1:]
        full = rest if rest.startswith("i") else "i" + rest
        return "", {"iu": "iou"}.get(full, full)
    if letters[0] == "w":
        rest = letters[1:]
        full = rest if rest.startswith("u") else "u" + rest
        return "", {"ui": "uei", "un": "uen"}.get(full, full)
    initial = next((i for i in ("zh", "ch", "sh", *INITIALS) if letters.startswith(i)), "")
    final = letters[len(initial) :]
    # After j, q and x, pinyin writes ü as u.
    if initial in ("j", "q", "x") and final.startswith("u"):
        final = "ü" + final[1:]
    return initial, _SHORT.get(final, final) if initial else final


def _reject(name: str, files: dict[str, bytes]) -> str:
    """Return why a file is rejected before it is decoded, or ""."""
    data = files[name]
    if data.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return WEB_PAGE
    if "v" in name and files.get(name.replace("v", "ü")) == data:
        return "copy of the recording spelt with ü"
    if name.endswith("5"):
        return "tone 5 is tone 1 squeezed in time"
    try:
        split_pinyin(name)
    except ValueError:
        return "not a syllable of standard Mandarin"
    return ""


def _split(names: list[str]) -> dict[str, str]:
    """Return name -> split; one tone of each syllable with two or more tones is held out."""
    tones = defaultdict(list)
    for name in names:
        tones[name[:-1]].append(name)
    split = dict.fromkeys(names, "train")
    for syllable, recordings in tones.items():
        ordered = sorted(recordings, key=lambda name: stable_hash("syllables", name))
        if len(ordered) > 1:
            split[ordered[0]] = "test"
        if (
            len(ordered) > 2
            and stable_hash("syllables-validation", syllable) % VALIDATION_EVERY == 0
        ):
            split[ordered[1]] = "validation"
    return split
